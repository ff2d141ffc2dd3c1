"""`Kernels` of NVIDIA GPUs in bf16 and fp16: cuBLAS for products, Triton for everything around them.

Attention reads KV in place through the window's strided pages, found through block tables that live on the
device. One row alone takes the fused matrix-vector kernels (linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.gpu.decode import Split, decode_attention
from prism.attention.gpu.linear import is_supported, vector_linear
from prism.attention.gpu.prefill import prefill_attention
from prism.attention.gpu.rows import rms_norm, rotate_and_store, silu_mul
from prism.attention.kernels import AttentionPlan, HeadNorms, KvView, Stream

HEAD_DIMS = (64, 128, 256)
"""What the attention kernels are made for."""


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
            prefill_attention(q, pages, self._tables, plan.tiles, out)
        return out.flatten(1)

    def norm_linear(
        self,
        stream: Stream,
        norm: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Stream]:
        """See `Kernels.norm_linear`."""
        rows, width = stream.residual.shape
        if rows == 1 and stream.delta is None and is_supported(width):
            if out is None:
                out = stream.residual.new_empty(1, weight.shape[0])
            return vector_linear(stream.residual, weight, out, norm=norm, eps=eps, bias=bias), stream
        x = rms_norm(stream, norm, eps)
        if out is None:
            return F.linear(x, weight, bias), Stream(stream.residual)
        assert bias is None
        return torch.mm(x, weight.t(), out=out), Stream(stream.residual)

    def norm_gate_up(self, stream: Stream, norm: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Stream]:
        """See `Kernels.norm_gate_up`."""
        rows, width = stream.residual.shape
        if rows == 1 and stream.delta is None and is_supported(width):
            out = stream.residual.new_empty(1, weight.shape[0] // 2)
            return vector_linear(stream.residual, weight, out, norm=norm, eps=eps, silu=True), stream
        x = rms_norm(stream, norm, eps)
        return silu_mul(F.linear(x, weight)), Stream(stream.residual)

    def add_linear(self, stream: Stream, x: Tensor, weight: Tensor, bias: Tensor | None) -> Stream:
        """See `Kernels.add_linear`."""
        if x.shape[0] == 1 and stream.delta is None and is_supported(x.shape[1]):
            residual = stream.residual
            return Stream(vector_linear(x, weight, residual, bias=bias, residual=residual))
        return Stream(stream.residual, F.linear(x, weight, bias))
