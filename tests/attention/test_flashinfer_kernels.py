"""FlashInfer's kernels against the torch ones, on a GPU, over one window with overlapping strided pages."""

from __future__ import annotations

import pytest
import torch

from prism.attention.kernels import BatchLayout, KvView
from prism.attention.torch_kernels import TorchKernels
from prism.types import BlockId

pytestmark = pytest.mark.gpu

LAYERS, TOKENS = 2, 16


def view(num_blocks: int, kv_heads: int, dim: int) -> KvView:
    """Blocks full of NaN, with pages that start every half block."""
    block = LAYERS * 2 * TOKENS * kv_heads * dim
    window = torch.full((num_blocks * block,), float("nan"), dtype=torch.bfloat16, device="cuda")
    row = kv_heads * dim
    shape = (2 * num_blocks - 1, LAYERS, 2, TOKENS, kv_heads, dim)
    return KvView(window.as_strided(shape, (block // 2, 2 * TOKENS * row, TOKENS * row, row, dim, 1)))


def close(actual: torch.Tensor, expected: torch.Tensor, limit: float = 1e-2) -> bool:
    """Relative L2 distance; NaN is never close."""
    return bool((actual.float() - expected.float()).norm() <= limit * expected.float().norm())


@pytest.fixture
def kernels() -> tuple[object, TorchKernels]:
    from prism.attention.flashinfer_kernels import WORKSPACE_BYTES, FlashInferKernels

    device = torch.device("cuda")
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return FlashInferKernels(device, workspace), TorchKernels(device)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 64), (32, 8, 128), (28, 4, 128)])
def test_mixed_steps(kernels: tuple, heads: int, kv_heads: int, dim: int) -> None:
    """Chunked prompts and decodes of three sequences, step by step."""
    fused, plain = kernels
    torch.manual_seed(0)
    views = view(24, kv_heads, dim), view(24, kv_heads, dim)
    lengths = [[50, 1, 1, 30], [1, 1, 40, 1], [90, 20, 1, 1]]
    tables: list[list[BlockId]] = [[], [], []]
    free = [BlockId(2 * i) for i in torch.randperm(24).tolist()]
    for step in range(4):
        query = [sequence[step] for sequence in lengths]
        context = [sum(sequence[: step + 1]) for sequence in lengths]
        fresh = []
        for table, n in zip(tables, context, strict=True):
            while len(table) * TOKENS < n:
                table.append(free.pop())
                fresh.append(table[-1])
        batch = BatchLayout(query, context, tables, tuple(fresh))
        q = torch.randn(sum(query), heads, dim, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.randn(sum(query), kv_heads, dim, dtype=torch.bfloat16, device="cuda") for _ in "kv")
        outs = []
        for kernel, pages in zip((fused, plain), views, strict=True):
            plan = kernel.plan(batch, pages, heads)
            outs.append(kernel.attention(plan, 1, q.clone(), k.clone(), v.clone()))
        assert close(*outs), step


def test_fused_layers(kernels: tuple) -> None:
    fused, plain = kernels
    torch.manual_seed(1)
    make = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    x, residual, weight = make(7, 2048), make(7, 2048), make(2048)
    for ours, theirs in zip(
        fused.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5),
        plain.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5),
        strict=True,
    ):
        assert close(ours, theirs)
    heads, positions, table = make(7, 8, 128), torch.arange(3, 10, device="cuda"), torch.randn(20, 128).cuda()
    part = make(7, 12, 128)[:, :8]  # rows of a fused projection: not contiguous
    for qk in (heads, part):
        expected = plain.rope(qk, positions, table)
        assert close(fused.rope(qk, positions, table), expected)
    assert close(fused.rms_norm(part, weight[:128], 1e-6), plain.rms_norm(part, weight[:128], 1e-6))
    gate_up = make(7, 4096)
    assert close(fused.silu_mul(gate_up.clone()), plain.silu_mul(gate_up.clone()))
