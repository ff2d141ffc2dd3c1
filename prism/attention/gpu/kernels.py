"""`Kernels` of NVIDIA GPUs in bf16 and fp16: cuBLAS for products, Triton for everything around them.

Attention reads KV in place through the window's strided pages, found through block tables that live on the
device; what a prompt's chunk brings itself is read from its rows (prefill.py). One row alone takes the fused
matrix-vector kernels (linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.gpu.decode import Split, decode_attention
from prism.attention.gpu.fp8 import is_scaled, norm_quantised, quantised, scaled_linear, silu_mul_quantised
from prism.attention.gpu.linear import is_supported, vector_linear
from prism.attention.gpu.prefill import prefill_attention
from prism.attention.gpu.rows import rms_norm, rotate_and_store, silu_mul
from prism.attention.kernels import AttentionPlan, HeadNorms, KvView, Stream, Weight

HEAD_DIMS = (64, 128, 256)
"""What the attention kernels are made for."""
ROWS_OF_LT = range(32, 128)
"""For so many rows cuBLASLt has quicker products of attention's and the MLP's last matrix than what torch
calls without a bias; with one it calls cuBLASLt. Measured with bf16 for an 8B on an H200 and for the MLP of a
14B (`benchmarks/engine`). Of the other matrices neither is quicker."""
OUTPUTS_OF_LT = range(4096, 1 << 16)
"""With 2,048 it is slower."""


def takes_lt(rows: int, outputs: int) -> bool:
    """Whether rows times a matrix of attention's or the MLP's end are given a bias of zeros."""
    return rows in ROWS_OF_LT and outputs in OUTPUTS_OF_LT


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """One step: first `num_decodes` tokens of as many sequences, then the tokens of prompt chunks."""

    kv: KvView
    num_heads: int
    slots: Tensor  # [tokens] int32, row of `tables`
    positions: Tensor  # [tokens] int32, -1 for padding
    num_decodes: int
    split: Split
    tiles: Tensor | None  # prefill's work list


class GpuKernels:
    """One lane's kernels. `tables [slot, block]` int32 and `scratch` uint8 are the lane's."""

    def __init__(self, device: torch.device, tables: Tensor, scratch: Tensor) -> None:
        self.device = device
        self._tables = tables
        self._scratch = scratch
        self._no_bias = torch.zeros(OUTPUTS_OF_LT.stop, dtype=torch.bfloat16, device=device)

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: Tensor, norms: HeadNorms | None, cos_sin: Tensor
    ) -> Tensor:
        """See `Kernels.attention`."""
        assert isinstance(plan, GpuPlan)
        pages = plan.kv.pages[:, layer]  # [unit, 2, token, kv_head, dim]
        q = rotate_and_store(
            qkv, pages, self._tables, plan.slots, plan.positions, cos_sin, plan.num_heads, norms
        )
        num = plan.num_decodes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if num:
            decode_attention(
                q[:num], pages, self._tables, plan.slots, plan.positions, self._scratch, plan.split, out[:num]
            )
        if plan.tiles is not None:
            prefill_attention(qkv, plan.num_heads, pages, self._tables, plan.tiles, out)
        return out.flatten(1)

    def norm_linear(
        self,
        stream: Stream,
        norm: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Stream]:
        """See `Kernels.norm_linear`."""
        rest = Stream(stream.residual)
        if _is_one_row(stream, weight):
            if out is None:
                out = rest.residual.new_empty(1, weight.values.shape[0])
            return vector_linear(rest.residual, weight, out, norm=norm, eps=eps, bias=bias), stream
        if is_scaled(weight, rest.residual.dtype):
            product = scaled_linear(norm_quantised(stream, norm, eps), weight, bias)
            return (product if out is None else out.copy_(product)), rest
        x = rms_norm(stream, norm, eps)
        if out is None:
            return F.linear(x, weight.plain(x.dtype), bias), rest
        assert bias is None
        return torch.mm(x, weight.plain(x.dtype).t(), out=out), rest

    def add_linear(self, stream: Stream, x: Tensor, weight: Weight, bias: Tensor | None) -> Stream:
        """See `Kernels.add_linear`."""
        residual = stream.residual
        if _is_one_row(stream, weight):
            return Stream(vector_linear(x, weight, residual, bias=bias, residual=residual))
        if is_scaled(weight, x.dtype):
            return Stream(residual, scaled_linear(quantised(x), weight, bias))
        plain = weight.plain(x.dtype)
        if bias is None and takes_lt(len(x), len(plain)):
            bias = self._no_bias.view(x.dtype)[: len(plain)]
        return Stream(residual, F.linear(x, plain, bias))

    def add_mlp(self, stream: Stream, norm: Tensor, eps: float, gate_up: Weight, down: Weight) -> Stream:
        """See `Kernels.add_mlp`."""
        residual = stream.residual
        if _is_one_row(stream, gate_up):
            out = residual.new_empty(1, down.values.shape[1])
            x = vector_linear(residual, gate_up, out, norm=norm, eps=eps, silu=True)
            return self.add_linear(stream, x, down, None)
        both, stream = self.norm_linear(stream, norm, eps, gate_up, None)
        if is_scaled(down, both.dtype):
            return Stream(residual, scaled_linear(silu_mul_quantised(both), down, None))
        return self.add_linear(stream, silu_mul(both), down, None)


def _is_one_row(stream: Stream, weight: Weight) -> bool:
    """Whether the fused matrix-vector kernels serve; they write into the residual."""
    is_fp8 = weight.scale is not None
    rows = stream.residual.shape[0]
    return rows == 1 and stream.delta is None and is_supported(weight.values.shape[1], is_fp8=is_fp8)
