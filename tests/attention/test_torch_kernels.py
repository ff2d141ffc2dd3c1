"""The torch backend against a plain loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism.attention.kernels import BatchLayout, KvView
from prism.attention.torch_kernels import TorchKernels
from prism.types import BlockId

LAYERS, TOKENS, KV_HEADS, DIM = 2, 4, 2, 8


def garbage_view(num_blocks: int) -> KvView:
    """Blocks full of NaN, laid out as in a window: half a block apart, so that pages overlap."""
    block = LAYERS * 2 * TOKENS * KV_HEADS * DIM
    unit = block // 2
    window = torch.full((num_blocks * block,), float("nan"))
    row = KV_HEADS * DIM
    shape = (2 * num_blocks - 1, LAYERS, 2, TOKENS, KV_HEADS, DIM)
    return KvView(window.as_strided(shape, (unit, 2 * TOKENS * row, TOKENS * row, row, DIM, 1)))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q [query, heads, dim]` at the end of `k, v [context, kv_heads, dim]`, one token at a time."""
    query, heads, dim = q.shape
    context = k.shape[0]
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for i in range(query):
        visible = context - query + i + 1
        for head in range(heads):
            scores = k[:visible, head // group] @ q[i, head] / math.sqrt(dim)
            out[i, head] = torch.softmax(scores, 0) @ v[:visible, head // group]
    return out


@pytest.mark.parametrize("heads", [2, 6])
def test_mixed_steps_equal_the_plain_loop(heads: int) -> None:
    """Chunked prompts and decodes of three sequences, stepwise, over blocks that start as garbage."""
    generator = torch.Generator().manual_seed(0)
    kernels, view = TorchKernels(torch.device("cpu")), garbage_view(12)
    lengths = [[5, 1, 1, 3], [1, 1, 4, 1], [9, 2, 1, 1]]
    tables: list[list[BlockId]] = [[], [], []]
    free = [BlockId(2 * i) for i in (7, 3, 11, 0, 5, 1, 9, 2, 10, 4, 8, 6)]
    keys = [torch.zeros(0, KV_HEADS, DIM) for _ in range(3)]
    values = [torch.zeros(0, KV_HEADS, DIM) for _ in range(3)]
    for step in range(4):
        query_lens = [sequence[step] for sequence in lengths]
        context_lens = [sum(sequence[: step + 1]) for sequence in lengths]
        fresh: list[BlockId] = []
        for table, context in zip(tables, context_lens, strict=True):
            while len(table) * TOKENS < context:
                table.append(free.pop())
                fresh.append(table[-1])
        batch = BatchLayout(query_lens, context_lens, tables, tuple(fresh))
        plan = kernels.plan(batch, view, heads)
        total = sum(query_lens)
        q = torch.randn(total, heads, DIM, generator=generator)
        k, v = (torch.randn(total, KV_HEADS, DIM, generator=generator) for _ in range(2))
        out = kernels.attention(plan, 1, q, k, v).split(query_lens)
        for i, (qs, ks, vs) in enumerate(
            zip(q.split(query_lens), k.split(query_lens), v.split(query_lens), strict=True)
        ):
            keys[i], values[i] = torch.cat((keys[i], ks)), torch.cat((values[i], vs))
            torch.testing.assert_close(out[i], plain_attention(qs, keys[i], values[i]))


def test_rope_rotates_pairs_by_their_position() -> None:
    kernels = TorchKernels(torch.device("cpu"))
    angles = torch.tensor([[0.0, 0.0], [0.3, 0.7]])
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    heads = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    rotated = kernels.rope(heads, torch.tensor([1]), table)
    for pair, angle in enumerate((0.3, 0.7)):
        complex_in = torch.complex(heads[0, :, pair], heads[0, :, pair + 2])
        expected = complex_in * torch.polar(torch.tensor(1.0), torch.tensor(angle))
        torch.testing.assert_close(rotated[0, :, pair], expected.real)
        torch.testing.assert_close(rotated[0, :, pair + 2], expected.imag)


def test_norm_and_activation_in_half_precision_round_as_the_reference_models_do() -> None:
    kernels = TorchKernels(torch.device("cpu"))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight = torch.rand(16).bfloat16()
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-6), weight * (x.float() * scale).bfloat16(), rtol=0, atol=0
    )
    normed, residual = kernels.add_rms_norm(x, x, weight, 1e-6)
    torch.testing.assert_close(residual, x + x)
    torch.testing.assert_close(normed, kernels.rms_norm(x + x, weight, 1e-6))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(kernels.silu_mul(x), torch.nn.functional.silu(gate) * up)
