"""Some rows in fp8 times fp8 weights, for the row counts at which cuBLAS reads such weights slowly.

Bound by reading the weights, as one row is (linear.py), but on the matrix units: a program takes some
channels and all rows: weights are the left operand, whose tiles are tall, and padded rows the right one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism.attention.gpu.launch import launch
from prism.attention.kernels import Weight

PADDED = (16, 64)
"""Rows that the kernel is compiled for; fewer are padded. More than these are cuBLAS's."""


class FewTile(NamedTuple):
    """How the kernel is cut: channels of a program, columns a turn, warps, turns that are loaded ahead."""

    channels: int
    columns: int
    warps: int
    stages: int


TILES = {
    (16, False): FewTile(64, 256, 4, 6),
    (16, True): FewTile(64, 256, 4, 4),
    (64, False): FewTile(64, 128, 4, 8),
    (64, True): FewTile(64, 256, 4, 3),
}
"""By padded rows, and whether there are many channels."""
MANY = 16384


@triton.jit(do_not_specialize=["M"])
def _few_kernel(
    x, x_scales, weight, scales, bias, out, M, N,
    K: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    rows = tl.arange(0, PADDED)
    columns = tl.arange(0, COLUMNS)
    real = channels < N
    weight_at = weight + tl.where(real, channels, 0).to(tl.int64)[:, None] * K + columns[None, :]
    x_at = x + rows[None, :] * K + columns[:, None]
    there = (rows < M)[None, :]
    acc = tl.zeros((CHANNELS, PADDED), tl.float32)
    for start in tl.range(0, K, COLUMNS):
        w = tl.load(weight_at + start, eviction_policy="evict_first")
        v = tl.load(x_at + start, mask=there, other=0.0)
        acc = tl.dot(w, v, acc)
    result = acc * tl.load(scales + channels, mask=real, other=0.0)[:, None]
    result *= tl.load(x_scales + rows, mask=rows < M, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + channels, mask=real, other=0.0).to(tl.float32)[:, None]
    target = out + rows[None, :] * N + channels[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None] & there)


def few_linear(
    values: Tensor, scales: Tensor, weight: Weight, bias: Tensor | None, tile: FewTile | None = None
) -> Tensor:
    """bf16 `[rows, out]` of `values [rows, in]`, fp8, times `scales [rows, 1]`, and `weight [out, in]`."""
    rows, width = values.shape
    size = weight.values.shape[0]
    tile = choose_tile(rows, size, width) if tile is None else tile
    out = torch.empty(rows, size, dtype=torch.bfloat16, device=values.device)
    launch(
        _few_kernel,
        (triton.cdiv(size, tile.channels), 1, 1),
        values,
        scales,
        weight.values,
        weight.scale,
        bias,
        out,
        rows,
        size,
        K=width,
        HAS_BIAS=bias is not None,
        CHANNELS=tile.channels,
        COLUMNS=tile.columns,
        PADDED=padded_rows(rows),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def padded_rows(rows: int) -> int:
    """The least of `PADDED` that holds so many."""
    return next(padded for padded in PADDED if rows <= padded)


def is_few(rows: int, width: int) -> bool:
    """Whether this kernel serves so many rows of such a width."""
    return rows <= PADDED[-1] and width % 128 == 0


def choose_tile(rows: int, size: int, width: int) -> FewTile:
    """The best on an H200 over the products of the 1B and 8B Llama shapes at 8 and 64 rows."""
    tile = TILES[padded_rows(rows), size >= MANY]
    return tile._replace(columns=next(c for c in (tile.columns, 256, 128) if width % c == 0))
