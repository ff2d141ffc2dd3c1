"""Attention of sequences that compute one token each, read in place from the window's pages.

Each program takes one sequence, one KV head with all query heads that share it, and one part of the context
(split KV, as in FlashDecoding); a second kernel joins the parts. Sizes that change from step to step are read
from device memory, so one CUDA graph serves contexts of any length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prism.attention.gpu.launch import launch, overlap

GROUP = 16
"""Rows of a matrix product: query heads of one KV head are padded to so many."""


class Split(NamedTuple):
    """How contexts are cut: at most `parts`, each of at least `tokens`."""

    parts: int
    tokens: int


@triton.jit
def _part_kernel(
    q,
    kv,
    tables,
    slots,
    positions,
    out,
    sums,
    q_stride,
    table_stride,
    page_stride,
    value_offset,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    """`kv` points to one layer's keys in the window's first page."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + row) + 1
    size = tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK, PART_TOKENS)
    begin = part * size
    end = tl.minimum(begin + size, length)
    shared: tl.constexpr = HEADS // KV_HEADS
    member = tl.arange(0, PADDED)
    dims = tl.arange(0, DIM)
    heads = head * shared + member
    real = member < shared
    if begin < end:
        slot = tl.load(slots + row)
        table = tables + slot.to(tl.int64) * table_stride
        queries = tl.load(
            q + row * q_stride + heads[:, None] * DIM + dims[None, :], mask=real[:, None], other=0.0
        )
        best = tl.full((PADDED,), -float("inf"), tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        acc = tl.zeros((PADDED, DIM), tl.float32)
        for start in tl.range(begin, end, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            valid = tokens < end
            page = tl.load(table + tokens // TOKENS, mask=valid, other=0).to(tl.int64)
            place = page * page_stride + (tokens % TOKENS) * (KV_HEADS * DIM) + head * DIM
            keys = tl.load(kv + place[:, None] + dims[None, :], mask=valid[:, None], other=0.0)
            values = tl.load(
                kv + value_offset + place[:, None] + dims[None, :], mask=valid[:, None], other=0.0
            )
            scores = tl.dot(queries, tl.trans(keys)) * scale
            scores = tl.where(valid[None, :], scores, -float("inf"))
            peak = tl.maximum(best, tl.max(scores, 1))
            weights = tl.exp2(scores - peak[:, None])
            decay = tl.exp2(best - peak)
            total = total * decay + tl.sum(weights, 1)
            acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None])
            best = peak
        result = acc / total[:, None]
        if PARTS == 1:
            tl.store(
                out + (row * HEADS + heads[:, None]) * DIM + dims[None, :],
                result.to(out.dtype.element_ty),
                mask=real[:, None],
            )
        else:
            place = (row * HEADS + heads) * PARTS + part
            tl.store(out + place[:, None] * DIM + dims[None, :], result, mask=real[:, None])
            tl.store(sums + place, best + tl.log2(total), mask=real)


@triton.jit
def _join_kernel(
    parts,
    sums,
    positions,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    PART_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Weighs the parts by their sums of exponentials (kept as logarithms to base 2)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(positions + row) + 1
    size = tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), BLOCK) * BLOCK, PART_TOKENS)
    count = tl.cdiv(length, size)
    base = (row * HEADS + head) * PARTS
    part, dims = tl.arange(0, PARTS), tl.arange(0, DIM)
    used = part < count
    logs = tl.load(sums + base + part, mask=used, other=-float("inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    weights = tl.where(used, weights, 0.0)
    values = tl.load(parts + (base + part)[:, None] * DIM + dims[None, :], mask=used[:, None], other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + (row * HEADS + head) * DIM + dims, result.to(out.dtype.element_ty), mask=length > 0)


BLOCK = 64
LOG2_E = 1.4426950408889634


SHORT = 4096
"""Contexts up to here need no parts when the batch alone fills the device."""
SCRATCH_BYTES = 32 * 2**20


def choose_split(batch: int, kv_heads: int, longest: int) -> Split:
    """Enough programs to fill the device; large batches are cut only where one long context would last.

    On an H200 with 132 multiprocessors 512 programs reach 4.1 TB/s uncut (benchmarks/engine).
    """
    programs = batch * kv_heads
    if programs >= 512:
        return Split(1, 256) if longest <= SHORT else Split(8, 1024)
    parts = max(2, min(32, triton.next_power_of_2(triton.cdiv(768, programs))))
    return Split(parts, 64 if parts >= 16 else 256)


def _fits(batch: int, heads: int, dim: int, split: Split) -> bool:
    """Whether the parts of a batch fit `SCRATCH_BYTES`."""
    return split.parts == 1 or batch * heads * split.parts * (dim + 1) * 4 <= SCRATCH_BYTES


def decode_attention(
    q: Tensor,
    pages: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    scratch: Tensor,
    split: Split,
    out: Tensor,
) -> None:
    """`out [rows, heads, dim]` is the attention of `q [rows, heads, dim]` over one layer's `pages`.

    `pages [unit, 2, token, kv_head, dim]` is a strided view; `tables [slot, block]` int32 holds page ids;
    `slots`, `positions` `[rows]` int32 name each row's table and newest token, whose KV is already stored. A
    row at position -1 is padding. `scratch` is uint8 of `SCRATCH_BYTES`, not shared with work beside it.
    """
    rows, heads, dim = q.shape
    tokens, kv_heads = pages.shape[2], pages.shape[3]
    if not _fits(rows, heads, dim, split):
        split = Split(1, 256)  # slower where contexts differ much, but right
    target, sums = out, out
    if split.parts > 1:
        count = rows * heads * split.parts
        floats = scratch[: count * (dim + 1) * 4].view(torch.float32)
        target, sums = floats[: count * dim], floats[count * dim :]
    launch(
        _part_kernel,
        (rows, kv_heads, split.parts),
        q,
        pages,
        tables,
        slots,
        positions,
        target,
        sums,
        q.stride(0),
        tables.stride(0),
        pages.stride(0),
        pages.stride(1),
        dim**-0.5 * LOG2_E,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        TOKENS=tokens,
        PARTS=split.parts,
        PART_TOKENS=split.tokens,
        BLOCK=BLOCK,
        PADDED=max(GROUP, triton.next_power_of_2(heads // kv_heads)),
        num_warps=4,
        num_stages=3,
        **overlap(rows),
    )
    if split.parts > 1:
        launch(
            _join_kernel,
            (rows, heads, 1),
            target,
            sums,
            positions,
            out,
            HEADS=heads,
            DIM=dim,
            PARTS=split.parts,
            PART_TOKENS=split.tokens,
            BLOCK=BLOCK,
            num_warps=4,
            **overlap(rows),
        )
