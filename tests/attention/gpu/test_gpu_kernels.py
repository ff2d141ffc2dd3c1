"""The GPU kernels against the torch ones, over one window with overlapping strided pages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prism.attention.kernels import BatchLayout, HeadNorms, KvView, Stream, Weight
from prism.attention.torch_kernels import TorchKernels
from prism.types import BlockId

pytestmark = pytest.mark.gpu

LAYERS, TOKENS = 2, 18


def view(num_blocks: int, kv_heads: int, dim: int) -> KvView:
    """Blocks full of NaN, with pages that start every half block."""
    block = LAYERS * 2 * TOKENS * kv_heads * dim
    window = torch.full((num_blocks * block,), float("nan"), dtype=torch.bfloat16, device="cuda")
    row = kv_heads * dim
    shape = (2 * num_blocks - 1, LAYERS, 2, TOKENS, kv_heads, dim)
    return KvView(window.as_strided(shape, (block // 2, 2 * TOKENS * row, TOKENS * row, row, dim, 1)))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; NaN stays NaN."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 64), (32, 8, 128), (28, 4, 128), (8, 1, 256)])
@pytest.mark.parametrize("normed", [False, True])
def test_mixed_steps(heads: int, kv_heads: int, dim: int, normed: bool) -> None:
    """Chunked prompts and decodes of four sequences, step by step, some contexts long enough for parts."""
    from prism.attention.gpu.decode import SCRATCH_BYTES, choose_split
    from prism.attention.gpu.kernels import GpuKernels, GpuPlan
    from prism.attention.gpu.prefill import Chunk, tiles_of

    torch.manual_seed(0)
    device = torch.device("cuda")

    def ints(values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    num_blocks = 100
    views = view(num_blocks, kv_heads, dim), view(num_blocks, kv_heads, dim)
    tables = torch.zeros(9, 64, dtype=torch.int32, device=device)
    fused = GpuKernels(device, tables, torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device))
    plain = TorchKernels(device)
    table = torch.randn(2000, dim, device=device)
    norms = HeadNorms(*torch.rand(2, dim, device=device).bfloat16() + 0.5, 1e-5) if normed else None
    lengths = [[50, 1, 1, 30], [1, 1, 300, 1], [600, 1, 1, 1], [129, 1, 128, 1]]
    blocks: list[list[BlockId]] = [[] for _ in lengths]
    free = [BlockId(2 * i) for i in torch.randperm(num_blocks).tolist()]
    for step in range(4):
        order = sorted(range(4), key=lambda i: lengths[i][step] > 1)  # decodes first
        query = [lengths[i][step] for i in order]
        context = [sum(lengths[i][: step + 1]) for i in order]
        fresh = []
        for i, n in zip(order, context, strict=True):
            while len(blocks[i]) * TOKENS < n:
                blocks[i].append(free.pop())
                fresh.append(blocks[i][-1])
            tables[2 * i + 1, : len(blocks[i])] = ints(blocks[i])
        qkv = torch.randn(sum(query), heads + 2 * kv_heads, dim, dtype=torch.bfloat16, device=device)
        batch = BatchLayout(query, context, [blocks[i] for i in order], tuple(fresh))
        expected = plain.attention(plain.plan(batch, views[0], heads), 1, qkv, norms, table)
        rows = [sum(query[:k]) for k in range(4)]
        chunks = [Chunk(rows[k], query[k], context[k], 2 * order[k] + 1) for k in range(4) if query[k] > 1]
        plan = GpuPlan(
            views[1],
            heads,
            ints([2 * order[k] + 1 for k in range(4) for _ in range(query[k])]),
            ints([p for k in range(4) for p in range(context[k] - query[k], context[k])]),
            query.count(1),
            choose_split(max(1, query.count(1)), kv_heads, max(context)),
            ints(tiles_of(chunks)) if chunks else None,
        )
        assert distance(fused.attention(plan, 1, qkv.clone(), norms, table), expected) < 0.01


@pytest.mark.parametrize("is_hopper", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_chunks_see_nothing_of_each_other(dim: int, is_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between, before and behind two chunks are rows without numbers, in tiles that the chunks' end in."""
    from prism.attention.gpu import prefill
    from prism.attention.gpu.prefill import Chunk, prefill_attention, tiles_of

    if not is_hopper:
        monkeypatch.setattr(prefill, "is_hopper", lambda: False)
    torch.manual_seed(0)
    heads, kv_heads = 4, 2
    qkv = torch.full((300, heads + 2 * kv_heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    pages = torch.full((1, 2, 16, kv_heads, dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    chunks = [Chunk(3, 70, 70, 0), Chunk(80, 130, 130, 0)]
    for row, query, *_ in chunks:
        qkv[row : row + query].normal_()
    tiles = torch.tensor([*tiles_of(chunks), [0] * 5], dtype=torch.int32, device="cuda")
    out = torch.zeros(300, heads, dim, dtype=torch.bfloat16, device="cuda")
    tables = torch.zeros(1, 16, dtype=torch.int32, device="cuda")
    prefill_attention(qkv, heads, pages, tables, tiles, out)
    for row, query, *_ in chunks:
        q, k, v = qkv[row : row + query].float().transpose(0, 1).split([heads, kv_heads, kv_heads])
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert distance(out[row : row + query], expected.transpose(0, 1)) < 0.01
        out[row : row + query] = 0
    assert not out.any()


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize(("hidden", "size"), [(2048, 8192), (4096, 14336), (896, 4864)])
def test_products_with_what_is_fused(rows: int, hidden: int, size: int) -> None:
    from prism.attention.gpu.kernels import GpuKernels

    torch.manual_seed(0)
    device = torch.device("cuda")
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    fused, plain = GpuKernels(device, nothing, nothing), TorchKernels(device)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * 0.1).bfloat16()

    norm, qkv, bias = random(hidden) + 1, Weight(random(size, hidden)), random(size)
    gate_up, down = Weight(random(2 * size, hidden)), Weight(random(hidden, size))
    streams = [Stream(random(rows, hidden) * 20) for _ in range(2)]
    streams[1] = Stream(streams[0].residual.clone())
    outs = []
    for kernels, stream in zip((fused, plain), streams, strict=True):
        first, stream = kernels.norm_linear(stream, norm, 1e-5, qkv, bias)
        stream = kernels.add_mlp(stream, norm, 1e-5, gate_up, down)
        last, stream = kernels.norm_linear(stream, norm, 1e-5, qkv, None, torch.empty_like(first))
        outs.append((first, stream.residual, last))
    for actual, expected in zip(*outs, strict=True):
        assert distance(actual, expected) < 0.01
