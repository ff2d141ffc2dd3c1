"""`Kernels` from FlashInfer: the backend of NVIDIA GPUs for bf16 and fp16.

Attention reads KV in place through the window's strided pages. Prompt chunks and decodes share one FA2
call: FlashInfer's CUDA-core decode kernel reaches 65 % of the bandwidth and refuses some head ratios.
The page ids go to the device in one copy from pinned memory.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.kernels import AttentionPlan, BatchLayout, KvView
from prism.attention.slots import token_slots
from prism.types import BlockId

os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")

WORKSPACE_BYTES = 128 * 2**20
HEAD_DIMS = (64, 128, 256)
"""What FlashInfer's attention has kernels for."""


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """One batch over one KV view."""

    kv: KvView
    wrapper: Any
    blocks: Tensor  # [tokens] int64
    offsets: Tensor  # [tokens] int64


class FlashInferKernels:
    """See the module's docstring. `workspace` is `WORKSPACE_BYTES` of the lane's memory, uint8."""

    def __init__(self, device: torch.device, workspace: Tensor) -> None:
        import flashinfer

        self.device = device
        self._flashinfer = flashinfer
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")

    def plan(self, batch: BatchLayout, kv: KvView, num_heads: int) -> FlashInferPlan:
        """Plans one FA2 call for the whole batch."""
        size = kv.tokens_per_block
        num_pages = [-(-context // size) for context in batch.context_lens]
        pages = [block for table, n in zip(batch.tables, num_pages, strict=True) for block in table[:n]]
        last = [context - (n - 1) * size for context, n in zip(batch.context_lens, num_pages, strict=True)]
        self._wrapper.plan(
            _int32([0, *accumulate(batch.query_lens)]),
            _int32([0, *accumulate(num_pages)]),
            _int32(pages).pin_memory().to(self.device, non_blocking=True),
            _int32(last),
            num_heads,
            kv.pages.shape[4],
            kv.pages.shape[5],
            size,
            causal=True,
            q_data_type=kv.pages.dtype,
            kv_data_type=kv.pages.dtype,
        )
        blocks, offsets = token_slots(batch, size)
        slots = torch.tensor((blocks, offsets), dtype=torch.int64).pin_memory()
        on_device = slots.to(self.device, non_blocking=True)
        return FlashInferPlan(kv, self._wrapper, on_device[0], on_device[1])

    def attention(self, plan: AttentionPlan, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v to their slots, then attend."""
        assert isinstance(plan, FlashInferPlan)
        pages = plan.kv.pages[:, layer]  # [unit, 2, token, kv_head, dim]
        pages[plan.blocks, 0, plan.offsets] = k
        pages[plan.blocks, 1, plan.offsets] = v
        out: Tensor = plan.wrapper.run(q, (pages[:, 0], pages[:, 1]))
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """cuBLAS."""
        return F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` is `[tokens, hidden]` or `[tokens, heads, dim]`."""
        out: Tensor = self._flashinfer.rmsnorm(x.contiguous(), weight, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Both are overwritten."""
        self._flashinfer.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def rope(self, heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """Rotates in place. The kernel wants queries and keys: the first head and the others do."""
        self._flashinfer.apply_rope_with_cos_sin_cache_inplace(
            positions, heads[:, :1].flatten(1), heads[:, 1:].flatten(1), heads.shape[-1], cos_sin
        )
        return heads

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """One fused kernel."""
        out: Tensor = self._flashinfer.silu_and_mul(gate_up)
        return out


def build_kernels(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    """Use every kernel once, so that what is not built yet is compiled now, in parallel. For any thread."""

    def attention() -> None:
        pages = torch.zeros(1, 1, 2, 16, 1, head_dim, dtype=dtype, device=device)
        plan = kernels.plan(BatchLayout([1], [1], [[BlockId(0)]]), KvView(pages), 1)
        heads = torch.ones(1, 1, head_dim, dtype=dtype, device=device)
        kernels.attention(plan, 0, heads, heads, heads)

    def norm() -> None:
        x = torch.ones(1, head_dim, dtype=dtype, device=device)
        kernels.add_rms_norm(x, x.clone(), x[0], 1e-6)
        kernels.rms_norm(x, x[0], 1e-6)

    def rope() -> None:
        heads = torch.ones(1, 2, head_dim, dtype=dtype, device=device)
        table = torch.ones(1, head_dim, device=device)
        kernels.rope(heads, torch.zeros(1, dtype=torch.int64, device=device), table)

    def activation() -> None:
        kernels.silu_mul(torch.ones(1, 2 * head_dim, dtype=dtype, device=device))

    kernels = FlashInferKernels(device, torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device))
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(work) for work in (attention, norm, rope, activation)]:
            done.result()


def _int32(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
