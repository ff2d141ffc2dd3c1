"""Matrix products of a few rows, bound by reading the weight once, with what stands around them fused in.

A decode step multiplies every weight by a handful of rows. cuBLAS reads such weights at 60-80 % of the bandwidth
and leaves norm, activation and residual to kernels of their own; here each product is one kernel:

    out = [residual +] act( norm(x) @ weight.T [+ bias] )

The norm's factor is one number a row, so the product is taken of `x * norm_weight` and scaled afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16


class Tile(NamedTuple):
    """How one kernel is cut: rows of the weight, columns a turn, warps, turns in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


@triton.jit
def _vector_kernel(
    x,
    weight,
    out,
    residual,
    norm,
    bias,
    eps,
    N,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row: sums of elementwise products, no matrix units. Each program makes `ROWS` outputs."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    base = weight + rows.to(tl.int64)[:, None] * K
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        w = tl.load(base + columns[None, :], mask=row_mask[:, None], other=0.0, eviction_policy="evict_first")
        value = tl.load(x + columns).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(norm + columns).to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if SILU:
            w = tl.load(
                base + (N.to(tl.int64) * K + columns[None, :]),
                mask=row_mask[:, None],
                other=0.0,
                eviction_policy="evict_first",
            )
            up += w.to(tl.float32) * value[None, :]
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    result = tl.sum(acc, 1) * scale
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)
    if SILU:
        result = result / (1 + tl.exp(-result)) * (tl.sum(up, 1) * scale)
    if HAS_RESIDUAL:
        result += tl.load(residual + rows, mask=row_mask, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def _rows_kernel(
    x,
    weight,
    out,
    residual,
    norm,
    bias,
    eps,
    M,
    N,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Up to `BATCH` rows on the matrix units, the weight as the left operand: `[ROWS, K] x [K, BATCH]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    batch = tl.arange(0, BATCH)
    batch_mask = batch < M
    base = weight + rows.to(tl.int64)[:, None] * K
    acc = tl.zeros((ROWS, BATCH), tl.float32)
    up = tl.zeros((ROWS, BATCH), tl.float32)
    squares = tl.zeros((BATCH,), tl.float32)
    for start in tl.range(0, K, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        w = tl.load(base + columns[None, :], mask=row_mask[:, None], other=0.0, eviction_policy="evict_first")
        value = tl.load(x + batch[None, :] * K + columns[:, None], mask=batch_mask[None, :], other=0.0)
        if HAS_NORM:
            wide = value.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            value = (wide * tl.load(norm + columns).to(tl.float32)[:, None]).to(value.dtype)
        acc = tl.dot(w, value, acc)
        if SILU:
            w = tl.load(
                base + (N.to(tl.int64) * K + columns[None, :]),
                mask=row_mask[:, None],
                other=0.0,
                eviction_policy="evict_first",
            )
            up = tl.dot(w, value, up)
    if HAS_NORM:
        scale = tl.rsqrt(squares / K + eps)
        acc *= scale[None, :]
        up *= scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    if SILU:
        acc = acc / (1 + tl.exp(-acc)) * up
    places = batch[None, :] * N + rows[:, None]
    mask = row_mask[:, None] & batch_mask[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=mask)


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`[rows, out]` of `x [rows, in]`, at most `MAX_ROWS`, and `weight [out, in]`, all contiguous.

    With `silu` the weight is `[2 out, in]`, gate before up. `residual [rows, out]` may be `out` itself.
    """
    num, width = x.shape
    size = weight.shape[0] // (2 if silu else 1)
    assert num <= MAX_ROWS and weight.shape[1] == width and x.is_contiguous() and weight.is_contiguous()
    if out is None:
        out = torch.empty(num, size, dtype=x.dtype, device=x.device)
    if tile is None:
        tile = choose_tile(num, size, width, silu=silu)
    flags = {
        "HAS_NORM": norm is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_BIAS": bias is not None,
        "SILU": silu,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = (triton.cdiv(size, tile.rows),)
    if num == 1:
        _vector_kernel[grid](x, weight, out, residual, norm, bias, eps, size, width, **flags)
    else:
        _rows_kernel[grid](x, weight, out, residual, norm, bias, eps, num, size, width, BATCH=16, **flags)
    return out


def choose_tile(num: int, size: int, width: int, *, silu: bool) -> Tile:
    """Measured on an H200 (benchmarks/engine)."""
    if num == 1:
        return Tile(4 if silu or size < 8192 else 8, 1024 if width % 1024 == 0 else 256, 4, 2)
    return Tile(16, 256, 4, 4)
