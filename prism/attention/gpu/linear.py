"""One row times a weight, bound by reading the weight once, with what stands around it fused in.

A decode step of one sequence multiplies every weight by one row. cuBLAS reads such weights at 60-90 % of the
bandwidth and leaves norm, activation and residual to kernels of their own; here each product is one kernel:

    out = [residual +] act( norm(x) @ weight.T [+ bias] )

The norm's factor is one number, so the product is taken of `x * norm_weight` and scaled afterwards, as are
the channels of fp8 weights. From two rows on cuBLAS is as fast (figures in benchmarks/engine).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prism.attention.gpu.launch import is_hopper, launch, overlap
from prism.attention.kernels import Weight


class Tile(NamedTuple):
    """How the kernel is cut: outputs of a program, columns a turn, warps."""

    rows: int
    columns: int
    warps: int


@triton.jit
def _vector_kernel(
    x,
    weight,
    scales,
    out,
    residual,
    norm,
    bias,
    eps,
    N,
    K: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sums of elementwise products, no matrix units."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = (rows < N)[:, None]
    columns = tl.arange(0, COLUMNS)
    base = weight + rows.to(tl.int64)[:, None] * K + columns[None, :]
    w = tl.load(base, mask=row_mask, other=0.0, eviction_policy="evict_first")
    if SILU:
        second = base + N.to(tl.int64) * K
        u = tl.load(second, mask=row_mask, other=0.0, eviction_policy="evict_first")
    if PDL:  # weights are on their way while the kernel before still computes x
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.static_range(0, K, COLUMNS):
        value = tl.load(x + start + columns).to(tl.float32)
        if HAS_NORM:
            squares += value * value
            value *= tl.load(norm + start + columns).to(tl.float32)
        acc += w.to(tl.float32) * value[None, :]
        if SILU:
            up += u.to(tl.float32) * value[None, :]
        if start + COLUMNS < K:
            w = tl.load(base + (start + COLUMNS), mask=row_mask, other=0.0, eviction_policy="evict_first")
            if SILU:
                u = tl.load(
                    second + (start + COLUMNS), mask=row_mask, other=0.0, eviction_policy="evict_first"
                )
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares) / K + eps)
    result = tl.sum(acc, 1) * scale
    second_result = tl.sum(up, 1) * scale
    if HAS_SCALES:
        result *= tl.load(scales + rows, mask=rows < N, other=0.0)
        if SILU:
            second_result *= tl.load(scales + N + rows, mask=rows < N, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
    if SILU:
        result = result / (1 + tl.exp(-result)) * second_result
    if HAS_RESIDUAL:
        result += tl.load(residual + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < N)


def vector_linear(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """`out [1, outputs]` of `x [1, in]` and `weight [outputs, in]`, all contiguous.

    With `silu` the weight is `[2 outputs, in]`, gate before up. `residual [1, outputs]` may be `out` itself.
    """
    size, width = out.shape[1], x.shape[1]
    has_scales = weight.scale is not None
    tile = choose_tile(size, width, silu=silu, is_fp8=has_scales) if tile is None else tile
    launch(
        _vector_kernel,
        (triton.cdiv(size, tile.rows), 1, 1),
        x,
        weight.values,
        weight.scale,
        out,
        residual,
        norm,
        bias,
        eps,
        size,
        K=width,
        HAS_SCALES=has_scales,
        HAS_NORM=norm is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        SILU=silu,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=1,
        **overlap(1),
    )
    return out


def is_supported(width: int, *, is_fp8: bool = False) -> bool:
    """Whether rows of such a width can be cut into whole turns, and the device knows the format."""
    return width % 256 == 0 and (not is_fp8 or is_hopper())


def choose_tile(size: int, width: int, *, silu: bool, is_fp8: bool = False) -> Tile:
    """The best or within 2 % of it on an H200 for the products of the 1B and 8B Llama shapes."""
    if is_fp8 and width % 2048 == 0:
        return Tile(4, 1024, 2) if silu and width >= 4096 else Tile(4, 2048, 4)
    if not silu and size <= 4096 <= width and width % 1024 == 0:
        return Tile(8, 1024, 4)
    for columns, warps in ((2048, 8), (1024, 4), (512, 2)):
        if width % columns == 0:
            rows = 2 if silu or width < 4096 else 4
            return Tile(rows if columns > 512 else 4, columns, warps)
    return Tile(8, 256, 4)
