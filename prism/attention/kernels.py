"""The interface between models and what a device can do fast.

A `Kernels` object belongs to one lane: it owns the scratch memory of its operations. `plan` is called once a
step, with the step's layout; the plan then serves all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism.types import BlockId


@dataclass(frozen=True, slots=True)
class KvView:
    """A model's view of the window.

    `pages` is `[unit, layer, 2, token, kv_head, head_dim]` with a page stride of one unit, so pages
    overlap: only those that start a block of this model mean anything. Most of it may be unmapped or
    belong to others: never print, copy or fill it as a whole.
    """

    pages: Tensor

    @property
    def tokens_per_block(self) -> int:
        """Tokens in one page."""
        return self.pages.shape[3]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Who is where in a step, as plain lists, one entry for each sequence of the batch."""

    query_lens: list[int]
    """Tokens computed in this step."""
    context_lens: list[int]
    """Tokens with KV after this step, these ones included."""
    tables: list[list[BlockId]]
    """Blocks of the whole context, in order."""
    new_blocks: tuple[BlockId, ...] = ()
    """Blocks that receive their first token in this step; what they held before is garbage."""


class AttentionPlan(Protocol):
    """What a backend computed for one batch; only that backend looks inside."""


class Kernels(Protocol):
    """Operations that a model's layers are made of. Shapes: tokens of all sequences are concatenated."""

    device: torch.device

    def plan(self, batch: BatchLayout, kv: KvView, num_heads: int) -> AttentionPlan:
        """Prepare attention for one batch over one model's KV."""
        ...

    def attention(self, plan: AttentionPlan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, `[tokens, kv_heads, dim]`, then attend causally with q `[tokens, heads, dim]`.

        Returns `[tokens, heads, dim]`.
        """
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [tokens, in]` times `weight [out, in]` transposed."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); both arguments may be overwritten."""
        ...

    def rope(self, heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """Rotate `heads [tokens, heads, dim]`, which may be overwritten.

        `cos_sin [positions, dim]` holds cosines, then sines, in fp32.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(first half) times second half of the last dimension."""
        ...
