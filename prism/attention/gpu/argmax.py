"""The likeliest token of each row, in two kernels that read the logits once at full speed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prism.attention.gpu.launch import launch, overlap

BLOCK = 4096
PARTS = 64
"""Most pieces of a row."""


@triton.jit
def _part_kernel(
    logits, best, place, size, stride, pieces,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The highest of `pieces` blocks of one row, the first one among equals."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = part * pieces * BLOCK
    value, index = -float("inf"), first
    for piece in tl.range(0, pieces):
        columns = first + piece * BLOCK + tl.arange(0, BLOCK)
        scores = tl.load(logits + row * stride + columns, mask=columns < size, other=-float("inf"))
        top, where = tl.max(scores.to(tl.float32), 0, return_indices=True)
        if top > value:
            value, index = top, first + piece * BLOCK + where
    tl.store(best + row * PARTS + part, value)
    tl.store(place + row * PARTS + part, index)


@triton.jit
def _join_kernel(best, place, slots, out, last_tokens, parts, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The token of one row, noted in `out` and as its slot's newest."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    values = tl.load(best + row * PARTS + part, mask=part < parts, other=-float("inf"))
    index = tl.load(place + row * PARTS + tl.argmax(values, 0))
    tl.store(out + row, index)
    tl.store(last_tokens + tl.load(slots + row), index)


def draw_greedy(
    logits: Tensor, best: Tensor, place: Tensor, slots: Tensor, out: Tensor, last_tokens: Tensor
) -> None:
    """Likeliest tokens of `logits [rows, vocabulary]` into `out [rows]` and `last_tokens[slots]`, both int32.

    `best [rows, PARTS]` fp32 and `place [rows, PARTS]` int32 are scratch.
    """
    rows, size = logits.shape
    blocks = triton.cdiv(size, BLOCK)
    pieces = triton.cdiv(blocks, PARTS)
    parts = triton.cdiv(blocks, pieces)
    launch(
        _part_kernel,
        (rows, parts, 1),
        logits,
        best,
        place,
        size,
        logits.stride(0),
        pieces,
        BLOCK=BLOCK,
        PARTS=PARTS,
        num_warps=8,
        **overlap(rows),
    )
    launch(
        _join_kernel,
        (rows, 1, 1),
        best,
        place,
        slots,
        out,
        last_tokens,
        parts,
        PARTS=PARTS,
        num_warps=1,
        **overlap(rows),
    )
