"""The torch backend against a plain loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from prism.attention.kernels import BatchLayout, HeadNorms, KvView, Stream, Weight
from prism.attention.torch_kernels import TorchKernels
from prism.types import BlockId
from tests.support.checkpoints import quantised

LAYERS, TOKENS, KV_HEADS, DIM = 2, 4, 2, 8
UNROTATED = torch.cat((torch.ones(64, DIM // 2), torch.zeros(64, DIM // 2)), dim=-1)


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
        qkv = torch.randn(total, heads + 2 * KV_HEADS, DIM, generator=generator)
        q, k, v = qkv.split([heads, KV_HEADS, KV_HEADS], dim=1)
        out = kernels.attention(plan, 1, qkv, None, UNROTATED).view(total, heads, DIM).split(query_lens)
        for i, (qs, ks, vs) in enumerate(
            zip(q.split(query_lens), k.split(query_lens), v.split(query_lens), strict=True)
        ):
            keys[i], values[i] = torch.cat((keys[i], ks)), torch.cat((values[i], vs))
            torch.testing.assert_close(out[i], plain_attention(qs, keys[i], values[i]))


def one_token(position: int, qkv: Tensor, norms: HeadNorms | None, table: Tensor) -> tuple[Tensor, Tensor]:
    """A token's key and value as they were stored."""
    kernels, view = TorchKernels(torch.device("cpu")), garbage_view(1)
    batch = BatchLayout([1], [position + 1], [[BlockId(0)]], (BlockId(0),))
    kernels.attention(kernels.plan(batch, view, qkv.shape[1] - 2 * KV_HEADS), 1, qkv, norms, table)
    page = view.pages[0, 1]
    return page[0, position], page[1, position]


def test_rope_rotates_pairs_by_their_position() -> None:
    angles = torch.rand(4, DIM // 2, generator=torch.Generator().manual_seed(0))
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    qkv = torch.randn(1, 2 + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))
    keys, values = one_token(2, qkv, None, table)
    torch.testing.assert_close(values, qkv[0, -KV_HEADS:])
    original = qkv[0, 2 : 2 + KV_HEADS]
    complex_in = torch.complex(original[:, : DIM // 2], original[:, DIM // 2 :])
    expected = complex_in * torch.polar(torch.ones(DIM // 2), angles[2])
    torch.testing.assert_close(keys, torch.cat((expected.real, expected.imag), dim=-1))


def test_heads_are_normed_before_they_rotate() -> None:
    qkv = torch.randn(1, 2 + 2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))
    norms = HeadNorms(torch.rand(DIM), torch.rand(DIM) + 1, 1e-6)
    keys, values = one_token(0, qkv, norms, UNROTATED)
    original = qkv[0, 2 : 2 + KV_HEADS]
    scale = torch.rsqrt(original.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(keys, original * scale * norms.key)
    torch.testing.assert_close(values, qkv[0, -KV_HEADS:])


def test_norm_and_activation_in_half_precision_round_as_the_reference_models_do() -> None:
    kernels = TorchKernels(torch.device("cpu"))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    norm, weight, down = (
        torch.rand(16).bfloat16(),
        torch.randn(24, 16).bfloat16(),
        torch.randn(16, 12).bfloat16(),
    )

    def normed(x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return norm * (x.float() * scale).bfloat16()

    def exact(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    linear = torch.nn.functional.linear
    out, stream = kernels.norm_linear(Stream(x), norm, 1e-6, Weight(weight), None)
    exact(out, linear(normed(x), weight))
    stream = kernels.add_linear(stream, x, Weight(weight[:16]), None)
    stream = kernels.add_mlp(stream, norm, 1e-6, Weight(weight), Weight(down))
    total = x + linear(x, weight[:16])
    exact(stream.residual, total)
    gate, up = linear(normed(total), weight).chunk(2, dim=-1)
    assert stream.delta is not None
    exact(stream.delta, linear(torch.nn.functional.silu(gate) * up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_weights_count_as_what_they_stand_for(dtype: torch.dtype) -> None:
    kernels = TorchKernels(torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)

    def weight(*shape: int) -> tuple[Weight, Weight]:
        values, scales = quantised(torch.randn(*shape, generator=generator))
        return Weight(values, scales), Weight((values.float() * scales[:, None]).to(dtype))

    x, bias = torch.randn(3, 16, generator=generator).to(dtype), torch.rand(24).to(dtype)
    norm = torch.rand(16, generator=generator).to(dtype)
    results = []
    for qkv, o, gate_up, down in zip(
        weight(24, 16), weight(16, 16), weight(24, 16), weight(16, 12), strict=True
    ):
        out, stream = kernels.norm_linear(Stream(x.clone()), norm, 1e-6, qkv, bias)
        stream = kernels.add_linear(stream, x, o, None)
        results.append((out, kernels.add_mlp(stream, norm, 1e-6, gate_up, down)))
    assert torch.equal(results[0][0], results[1][0])
    first, second = (stream for _, stream in results)
    assert first.delta is not None and second.delta is not None
    assert torch.equal(first.residual + first.delta, second.residual + second.delta)
