"""Attention of prompt chunks, read in place from the window's pages (FlashAttention-2's loop in Triton).

Each program takes one query head and `BLOCK_M` queries of one chunk. Tiles of keys that all of them see need
no mask; the last ones, on the diagonal, do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from prism.attention.gpu.launch import launch

BLOCK_M = 128
TILE_WORDS = 5
"""Of an entry of the work list."""
LOG2_E = 1.4426950408889634


class Chunk(NamedTuple):
    """One prompt's tokens of a step: `query` of them end at position `context - 1`, from `row` on."""

    row: int
    query: int
    context: int
    slot: int


class Cut(NamedTuple):
    """Keys of a turn, warps, turns that are loaded ahead."""

    keys: int
    warps: int
    stages: int


def choose_cut(dim: int) -> Cut:
    """The best of nine for 4,000 tokens and 32 heads on an H200: 432 -> 399 us (128), 223 -> 204 us (64)."""
    match dim:
        case 128:
            return Cut(128, 8, 2)
        case 64:
            return Cut(64, 8, 3)
        case _:
            return Cut(64, 4, 3)


def tiles_of(chunks: Sequence[Chunk]) -> list[list[int]]:
    """The kernel's work list: one `[row, query, context, slot, first query]` for each tile of queries.

    Long tiles first, since short ones then fill the gaps at the end. An entry of zeros is nobody's.
    """
    tiles = [[*chunk, start] for chunk in chunks for start in range(0, chunk.query, BLOCK_M)]
    return sorted(tiles, key=lambda t: t[1] - t[2] - t[4])


@triton.jit
def _attend(
    queries, keys_at, table, first, last, own, context, best, total, acc,
    page_stride, value_offset, scale,
    ROW: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys `[first, last)`."""
    dims = tl.arange(0, DIM)
    for start in tl.range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        if MASKED:
            page = tl.load(table + tokens // TOKENS, mask=tokens < context, other=0).to(tl.int64)
        else:
            page = tl.load(table + tokens // TOKENS).to(tl.int64)
        place = keys_at + (page * page_stride + (tokens % TOKENS) * ROW)[:, None] + dims[None, :]
        if MASKED:
            keys = tl.load(place, mask=(tokens < context)[:, None], other=0.0)
            values = tl.load(place + value_offset, mask=(tokens < context)[:, None], other=0.0)
        else:
            keys = tl.load(place)
            values = tl.load(place + value_offset)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        if MASKED:
            scores = tl.where(tokens[None, :] <= own[:, None], scores, -float("inf"))
        peak = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - peak[:, None])
        decay = tl.exp2(best - peak)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None])
        best = peak
    return best, total, acc


@triton.jit
def _prefill_kernel(
    q, kv, tables, tiles, out, q_stride, table_stride, page_stride, value_offset, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`kv` points to one layer's keys in the window's first page."""
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 5
    row, query, context = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_stride
    start = tl.load(tile + 4)
    members = start + tl.arange(0, BLOCK_M)
    real = (members < query)[:, None]
    own = context - query + members
    dims = tl.arange(0, DIM)
    rows = (row + members).to(tl.int64)
    queries = tl.load(q + rows[:, None] * q_stride + head * DIM + dims[None, :], mask=real, other=0.0)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)
    keys_at = kv + (head // (HEADS // KV_HEADS)) * DIM
    visible = context - query + start + 1  # keys that even the first query sees
    diagonal = visible // BLOCK_N * BLOCK_N
    end = tl.minimum(context, context - query + start + BLOCK_M)
    best, total, acc = _attend(
        queries, keys_at, table, 0, diagonal, own, context, best, total, acc,
        page_stride, value_offset, scale, KV_HEADS * DIM, DIM, TOKENS, BLOCK_N, False,
    )  # fmt: skip
    best, total, acc = _attend(
        queries, keys_at, table, diagonal, end, own, context, best, total, acc,
        page_stride, value_offset, scale, KV_HEADS * DIM, DIM, TOKENS, BLOCK_N, True,
    )  # fmt: skip
    target = out + (rows[:, None] * HEADS + head) * DIM + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


def prefill_attention(q: Tensor, pages: Tensor, tables: Tensor, tiles: Tensor, out: Tensor) -> None:
    """Causal attention of prompt chunks into their rows of `out [tokens, heads, dim]`.

    `q [tokens, heads, dim]`, heads contiguous; `pages [unit, 2, token, kv_head, dim]` one layer's view;
    `tables [slot, block]` int32; `tiles [count, 5]` int32 as `tiles_of` lists them, on the device.
    """
    heads, dim = q.shape[1], q.shape[2]
    cut = choose_cut(dim)
    launch(
        _prefill_kernel, (heads, tiles.shape[0], 1),
        q, pages, tables, tiles, out, q.stride(0), tables.stride(0), pages.stride(0), pages.stride(1),
        dim**-0.5 * LOG2_E,
        HEADS=heads, KV_HEADS=pages.shape[3], DIM=dim, TOKENS=pages.shape[2],
        BLOCK_M=BLOCK_M, BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
