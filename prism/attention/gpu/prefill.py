"""Attention of prompt chunks (FlashAttention-2's loop in Triton).

Each program takes one query head and `TILE` queries of one chunk. What lies before the chunk is read in
place from the window's pages; the chunk's own keys and values are still rows of its product with the weights,
from where Hopper's tensor memory accelerator brings a tile at a time. Tiles of keys that all queries see need
no mask; the last ones, at the end of the pages and on the diagonal, do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prism.attention.gpu.launch import is_hopper, launch

TILE = 64
"""Queries of a program, and keys of a turn."""
WARPS = 4
TILE_WORDS = 5
"""Of an entry of the work list."""
LOG2_E = 1.4426950408889634


class Chunk(NamedTuple):
    """One prompt's tokens of a step: `query` of them end at position `context - 1`, from `row` on."""

    row: int
    query: int
    context: int
    slot: int


def choose_options(dim: int) -> dict[str, int]:
    """What was best for heads of this width (`benchmarks/engine/prompt_attention.py`, H200).

    `num_stages` are tiles of keys that are there or on their way. A multiprocessor has shared memory for just
    two programs with three tiles of 128, and for four of 64 with two, if they make do with 128 registers.
    """
    match dim:
        case 64:
            return {"num_stages": 2, "maxnreg": 128}
        case 128:
            return {"num_stages": 3}
        case _:
            return {"num_stages": 2}


def tiles_of(chunks: Sequence[Chunk]) -> list[list[int]]:
    """The kernel's work list: one `[row, query, context, slot, first query]` for each tile of queries.

    Long tiles first, since short ones then fill the gaps at the end. An entry of zeros is nobody's.
    """
    tiles = [[*chunk, start] for chunk in chunks for start in range(0, chunk.query, TILE)]
    return sorted(tiles, key=lambda t: t[1] - t[2] - t[4])


@triton.jit
def _fold(queries, keys, values, tokens, last, best, total, acc, scale, MASKED: tl.constexpr):
    """Online softmax over one tile of keys; with `MASKED` a query sees `tokens` up to its `last` one."""
    scores = tl.dot(queries, tl.trans(keys))
    if MASKED:
        scores = tl.where(tokens[None, :] <= last[:, None], scores, -float("inf"))
    peak = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - peak[:, None])
    decay = tl.exp2(best - peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None])
    return peak, total, acc


@triton.jit
def _load(keys_at, value_offset, real, MASKED: tl.constexpr):
    """A tile of keys and one of values; with `MASKED` only of what is `real`."""
    if MASKED:
        keys = tl.load(keys_at, mask=real[:, None], other=0.0)
        values = tl.load(keys_at + value_offset, mask=real[:, None], other=0.0)
    else:
        keys = tl.load(keys_at)
        values = tl.load(keys_at + value_offset)
    return keys, values


@triton.jit
def _attend_pages(
    queries, keys_at, table, first, end, context, best, total, acc, page_stride, value_offset, scale,
    ROW: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Over tokens `[first, end)` of the sequence, of which all before `context` are seen."""
    dims = tl.arange(0, DIM)
    for start in tl.range(first, end, TILE, num_stages=1 if MASKED else None):
        tokens = start + tl.arange(0, TILE)
        if MASKED:
            page = tl.load(table + tokens // TOKENS, mask=tokens < context, other=0).to(tl.int64)
        else:
            page = tl.load(table + tokens // TOKENS).to(tl.int64)
        place = keys_at + (page * page_stride + (tokens % TOKENS) * ROW)[:, None] + dims[None, :]
        keys, values = _load(place, value_offset, tokens < context, MASKED)
        last = tl.full((queries.shape[0],), context - 1, tl.int32)
        best, total, acc = _fold(queries, keys, values, tokens, last, best, total, acc, scale, MASKED)
    return best, total, acc


@triton.jit
def _attend_rows(
    queries, qkv, row, query, first, end, members, column, best, total, acc, scale,
    WIDTH: tl.constexpr, VALUES: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Over tokens `[first, end)` of a chunk of `query`, which begins at `row`; `members` are the queries'.

    Keys lie from `column` on, values `VALUES` behind them. Rows behind the chunk are somebody else's.
    """
    dims = tl.arange(0, DIM)
    for start in tl.range(first, end, TILE, num_stages=1 if MASKED else None):
        tokens = start + tl.arange(0, TILE)
        if TMA:
            keys = qkv.load([row + start, column])
            values = qkv.load([row + start, column + VALUES])
            if MASKED:
                values = tl.where((tokens < query)[:, None], values, 0.0)
        else:
            place = qkv + (row + tokens).to(tl.int64)[:, None] * WIDTH + column + dims[None, :]
            keys, values = _load(place, VALUES, tokens < query, MASKED)
        best, total, acc = _fold(queries, keys, values, tokens, members, best, total, acc, scale, MASKED)
    return best, total, acc


@triton.jit
def _prefill_kernel(
    q, qkv, kv, tables, tiles, out, table_stride, page_stride, value_offset, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`kv` points to one layer's keys in the window's first page; `q` and `qkv` are the same rows."""
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 5
    row, query, context = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    table = tables + tl.load(tile + 3).to(tl.int64) * table_stride
    start = tl.load(tile + 4)
    members = start + tl.arange(0, TILE)
    real = (members < query)[:, None]
    dims = tl.arange(0, DIM)
    rows = (row + members).to(tl.int64)
    queries = tl.load(q + rows[:, None] * width + head * DIM + dims[None, :], mask=real, other=0.0)
    best = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, DIM), tl.float32)
    before = context - query
    kv_head = head // (HEADS // KV_HEADS)
    keys_at = kv + kv_head * DIM
    whole = before // TILE * TILE
    best, total, acc = _attend_pages(
        queries, keys_at, table, 0, whole, before, best, total, acc, page_stride, value_offset, scale,
        KV_HEADS * DIM, DIM, TOKENS, TILE, False,
    )  # fmt: skip
    best, total, acc = _attend_pages(
        queries, keys_at, table, whole, before, before, best, total, acc, page_stride, value_offset, scale,
        KV_HEADS * DIM, DIM, TOKENS, TILE, True,
    )  # fmt: skip
    column = (HEADS + kv_head) * DIM
    end = tl.minimum(query, start + TILE)
    best, total, acc = _attend_rows(
        queries, qkv, row, query, 0, start, members, column, best, total, acc, scale,
        width, KV_HEADS * DIM, DIM, TILE, False, TMA,
    )  # fmt: skip
    best, total, acc = _attend_rows(
        queries, qkv, row, query, start, end, members, column, best, total, acc, scale,
        width, KV_HEADS * DIM, DIM, TILE, True, TMA,
    )  # fmt: skip
    target = out + (rows[:, None] * HEADS + head) * DIM + dims[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


def prefill_attention(
    qkv: Tensor, num_heads: int, pages: Tensor, tables: Tensor, tiles: Tensor, out: Tensor
) -> None:
    """Causal attention of prompt chunks into their rows of `out [tokens, heads, dim]`.

    `qkv [tokens, heads + 2 kv_heads, dim]`, contiguous, queries and keys rotated;
    `pages [unit, 2, token, kv_head, dim]` one layer's view; `tables [slot, block]` int32;
    `tiles [count, 5]` int32 as `tiles_of` lists them, on the device.
    """
    dim = qkv.shape[2]
    rows = qkv.flatten(1)
    source: Any = rows
    if is_hopper():
        source = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [TILE, dim])
    launch(
        _prefill_kernel, (num_heads, tiles.shape[0], 1),
        rows, source, pages, tables, tiles, out,
        tables.stride(0), pages.stride(0), pages.stride(1), dim**-0.5 * LOG2_E,
        HEADS=num_heads, KV_HEADS=pages.shape[3], DIM=dim, TOKENS=pages.shape[2],
        TILE=TILE, TMA=is_hopper(), num_warps=WARPS, **choose_options(dim),
    )  # fmt: skip
