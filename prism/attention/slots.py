"""Where the KV of a step's tokens goes."""

from __future__ import annotations

from prism.attention.kernels import BatchLayout
from prism.types import BlockId


def token_slots(batch: BatchLayout, tokens_per_block: int) -> tuple[list[BlockId], list[int]]:
    """Block of each token that the step computes, and its place in the block."""
    blocks: list[BlockId] = []
    offsets: list[int] = []
    for query, context, table in zip(batch.query_lens, batch.context_lens, batch.tables, strict=True):
        for position in range(context - query, context):
            blocks.append(table[position // tokens_per_block])
            offsets.append(position % tokens_per_block)
    return blocks, offsets
