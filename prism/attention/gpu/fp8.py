"""Several rows times fp8 weights on the matrix units, which want both sides in fp8.

So each row is quantised on its way: one scale a row, from its largest number, in the kernel that computes the
row anyway where there is one (norm, activation). The product is cuBLAS's or that of few_rows.py; both
multiply by the scales at their end. One row alone keeps its precision: reading weights binds it (linear.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prism.attention.gpu.few_rows import few_linear, is_few
from prism.attention.gpu.launch import is_hopper, launch, overlap
from prism.attention.gpu.rows import normed_row, silu_mul_row
from prism.attention.kernels import Stream, Weight
from prism.modelspec import ModelSpec
from prism.types import DType

MULTIPLE = 16
"""What cuBLAS's fp8 products want widths and numbers of channels to be multiples of."""


class Quantised(NamedTuple):
    """Rows in fp8 and what to multiply each by."""

    values: Tensor  # [rows, width] fp8
    scales: Tensor  # [rows, 1] fp32


def is_scaled(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether rows of `dtype` can be multiplied by this weight in fp8; cuBLAS then answers in bf16."""
    sizes = weight.values.shape
    return (
        weight.scale is not None
        and dtype is torch.bfloat16
        and is_hopper()
        and sizes[0] % MULTIPLE == 0
        and sizes[1] % MULTIPLE == 0
    )


def slow_because(spec: ModelSpec) -> str | None:
    """Why fp8 weights of a model are written out for each product of several rows, if they are."""
    if not is_hopper():
        return "the GPU is older than Hopper"
    if spec.dtype is not DType.BF16:
        return "products of fp8 give bf16 only, and the model computes in another format"
    widths = (spec.hidden_size, spec.intermediate_size, spec.head_dim)
    if any(width % MULTIPLE for width in widths):
        return f"a width of the model is no multiple of {MULTIPLE}"
    return None


def is_fast(spec: ModelSpec) -> bool:
    """Whether products of several rows multiply a model's layers in fp8."""
    return spec.quantization == "fp8" and slow_because(spec) is None


def scaled_linear(x: Quantised, weight: Weight, bias: Tensor | None) -> Tensor:
    """Rows times `weight [out, in]` transposed, in bf16."""
    assert weight.scale is not None
    if is_few(*x.values.shape):
        return few_linear(x.values, x.scales, weight, bias)
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scale[None, :],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


@triton.jit
def _store_quantised(value, out, scales, row, columns, mask, WIDTH: tl.constexpr):
    """`value` is 0 where there is no number."""
    peak = tl.max(tl.abs(value), 0)
    scale = tl.where(peak > 0, peak / 448.0, 1.0)
    tl.store(scales + row, scale)
    tl.store(out + row * WIDTH + columns, (value / scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x, residual, weight, out, scales, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    mask = columns < WIDTH
    value = normed_row(x, residual, weight, row, columns, mask, eps, WIDTH, HAS_RESIDUAL)
    _store_quantised(value, out, scales, row, columns, mask, WIDTH)


@triton.jit
def _silu_kernel(
    gate_up, out, scales, WIDTH: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    mask = columns < WIDTH
    value = silu_mul_row(gate_up, row, columns, mask, WIDTH)
    _store_quantised(value, out, scales, row, columns, mask, WIDTH)


@triton.jit
def _plain_kernel(x, out, scales, WIDTH: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    mask = columns < WIDTH
    value = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    _store_quantised(value, out, scales, row, columns, mask, WIDTH)


def norm_quantised(stream: Stream, weight: Tensor, eps: float) -> Quantised:
    """As `rows.rms_norm`, quantised."""
    residual, delta = stream.residual, stream.delta
    rows, width = residual.shape
    out = _empty(rows, width, residual.device)
    launch(
        _norm_kernel,
        (rows, 1, 1),
        residual if delta is None else delta,
        residual,
        weight,
        out.values,
        out.scales,
        eps,
        HAS_RESIDUAL=delta is not None,
        **_row_options(rows, width),
    )
    return out


def silu_mul_quantised(gate_up: Tensor) -> Quantised:
    """As `rows.silu_mul`, quantised."""
    rows, double = gate_up.shape
    out = _empty(rows, double // 2, gate_up.device)
    options = _row_options(rows, double // 2)
    launch(_silu_kernel, (rows, 1, 1), gate_up, out.values, out.scales, **options)
    return out


def quantised(x: Tensor) -> Quantised:
    """Rows of `x [rows, width]`, contiguous."""
    rows, width = x.shape
    out = _empty(rows, width, x.device)
    launch(_plain_kernel, (rows, 1, 1), x, out.values, out.scales, **_row_options(rows, width))
    return out


def _empty(rows: int, width: int, device: torch.device) -> Quantised:
    values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device)
    return Quantised(values, torch.empty(rows, 1, dtype=torch.float32, device=device))


def _row_options(rows: int, width: int) -> dict[str, object]:
    """A program takes a whole row."""
    padded = triton.next_power_of_2(width)
    warps = min(16, max(1, padded // 512))
    return {"WIDTH": width, "PADDED": padded, "num_warps": warps, **overlap(rows)}
