"""How a model's KV blocks lie in slabs.

A block holds keys and values of all layers for some tokens, `[layer, 2, token, kv_head, head_dim]`,
and lies at a multiple of `unit` inside one slab:

    window  |---- slab 0 ----|---- slab 1 ----|   slabs of any owner, side by side
    slab 1                   [b0][b1][b2].....x   x = lost, 3 % at most where a block size allows it
    block id = (offset of the block in the window) / unit

so the whole window is one paged tensor whose page stride is `unit`, whoever owns which slab.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism.modelspec import ModelSpec
from prism.types import BlockId, Bytes, KiB

MAX_UNIT = 64 * KiB
MAX_LOSS = 0.03
BLOCK_TOKENS = range(16, 65)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Sizes of one model's blocks."""

    tokens_per_block: int
    block_bytes: Bytes
    unit: Bytes
    slab_bytes: Bytes

    @property
    def blocks_per_slab(self) -> int:
        """Whole blocks in one slab."""
        return self.slab_bytes // self.block_bytes

    @property
    def loss(self) -> float:
        """Share of a slab that no block covers."""
        return 1 - self.blocks_per_slab * self.block_bytes / self.slab_bytes

    def block_at(self, slab_offset: Bytes, index: int) -> BlockId:
        """Id of a slab's block, given the slab's offset in the window."""
        return BlockId((slab_offset + index * self.block_bytes) // self.unit)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.tokens_per_block)


def plan_kv_layout(spec: ModelSpec, slab_bytes: Bytes) -> KvLayout | None:
    """The layout with the fewest tokens a block that loses `MAX_LOSS` of a slab at most, else the least.

    None when not even one block of the smallest size fits a slab.
    """
    return layout_of(spec.kv_bytes_per_token, slab_bytes)


def layout_of(per_token: Bytes, slab_bytes: Bytes) -> KvLayout | None:
    """The same for a model of which no more is known than the bytes of KV of a token."""
    layouts = [
        KvLayout(tokens, Bytes(tokens * per_token), _unit(tokens * per_token), slab_bytes)
        for tokens in BLOCK_TOKENS
        if tokens * per_token <= slab_bytes
    ]
    if not layouts:
        return None
    good = [layout for layout in layouts if layout.loss <= MAX_LOSS]
    return good[0] if good else min(layouts, key=lambda layout: layout.loss)


def _unit(block_bytes: int) -> Bytes:
    """The largest power of two that divides a block, `MAX_UNIT` at most."""
    return Bytes(min(block_bytes & -block_bytes, MAX_UNIT))
