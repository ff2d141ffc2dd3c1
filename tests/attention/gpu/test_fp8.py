"""Products with fp8 weights against torch, and what the fused kernels make of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from prism.attention.kernels import Stream, Weight
from prism.attention.torch_kernels import TorchKernels
from tests.support.checkpoints import quantised as quantised_by_torch

pytestmark = pytest.mark.gpu


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; NaN stays NaN."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def weight(*shape: int) -> Weight:
    values, scales = quantised_by_torch(torch.randn(*shape, device="cuda") * 0.02)
    return Weight(values, scales)


def normed(x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.float(), x.shape[-1:], norm.float(), 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("width", [896, 4096, 14336])
def test_rows_are_quantised_as_torch_does(rows: int, width: int) -> None:
    """A rounding on the way may come out otherwise: one number in some hundred, and then by one step."""
    from prism.attention.gpu import fp8

    torch.manual_seed(0)
    x, delta, both, norm = (
        random(n, w) for n, w in ((rows, width), (rows, width), (rows, 2 * width), (1, width))
    )
    x[-1, : width // 2] = 0
    gate, up = both.float().chunk(2, dim=1)
    kinds: list[tuple[Callable[[], fp8.Quantised], torch.Tensor]] = [
        (lambda: fp8.quantised(x), x.float()),
        (lambda: fp8.silu_mul_quantised(both), torch.nn.functional.silu(gate) * up),
        (lambda: fp8.norm_quantised(Stream(x), norm[0], 1e-5), normed(x, norm[0])),
        (lambda: fp8.norm_quantised(Stream(x.clone(), delta), norm[0], 1e-5), normed(x + delta, norm[0])),
    ]
    for make, rows_in_fp32 in kinds:
        actual, (values, scales) = make(), quantised_by_torch(rows_in_fp32)
        torch.testing.assert_close(actual.scales[:, 0], scales, rtol=1e-5, atol=0)
        other = actual.values.view(torch.uint8).int() - values.view(torch.uint8).int()
        assert float((other != 0).float().mean()) < 0.02 and int(other.abs().max()) <= 1
    zeros = fp8.quantised(torch.zeros_like(x))
    assert bool((zeros.scales == 1).all()) and not zeros.values.view(torch.uint8).any()


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 513])
@pytest.mark.parametrize(("size", "width"), [(6144, 4096), (1152, 896), (16400, 2048), (1008, 1040)])
def test_products_multiply_both_scales(rows: int, size: int, width: int) -> None:
    from prism.attention.gpu import fp8

    torch.manual_seed(0)
    matrix, bias = weight(size, width), random(size)
    x = fp8.quantised(random(rows, width))
    exact = (x.values.float() * x.scales) @ matrix.plain(torch.float32).t()
    assert distance(fp8.scaled_linear(x, matrix, None), exact) < 0.005
    assert distance(fp8.scaled_linear(x, matrix, bias), exact + bias.float()) < 0.005


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 33, 100])
@pytest.mark.parametrize(("hidden", "size"), [(2048, 8192), (4096, 14336), (896, 4864), (1000, 2008)])
def test_products_with_what_is_fused(rows: int, hidden: int, size: int, dtype: torch.dtype) -> None:
    """One row keeps its precision. Several go through fp8, unless the format or a width forbids it."""
    from prism.attention.gpu.kernels import GpuKernels

    torch.manual_seed(0)
    device = torch.device("cuda")
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    norm, bias = random(hidden, dtype=dtype) * 0.1 + 1, random(size, dtype=dtype)
    qkv, o, gate_up, down = (
        weight(size, hidden),
        weight(hidden, size),
        weight(2 * size, hidden),
        weight(hidden, size),
    )
    x, heads = random(rows, hidden, dtype=dtype), random(rows, size, dtype=dtype)
    outs = []
    for kernels in (GpuKernels(device, nothing, nothing), TorchKernels(device)):
        first, stream = kernels.norm_linear(Stream(x.clone()), norm, 1e-5, qkv, bias)
        stream = kernels.add_linear(stream, heads, o, None)
        stream = kernels.add_mlp(stream, norm, 1e-5, gate_up, down)
        total = stream.residual if stream.delta is None else stream.residual + stream.delta
        outs.append((first, total, kernels.norm_linear(stream, norm, 1e-5, qkv, None)[0]))
    is_plain = dtype is torch.float16 or hidden % 16 != 0
    is_precise = is_plain or (rows == 1 and hidden % 256 == 0)
    for actual, expected in zip(*outs, strict=True):
        assert distance(actual, expected) < (0.01 if is_precise else 0.06)


def test_products_in_graphs_leave_no_workspaces_behind() -> None:
    from prism.attention.gpu import fp8

    torch.manual_seed(0)
    matrix, x = weight(6144, 4096), random(100, 4096)
    eager = fp8.scaled_linear(fp8.quantised(x), matrix, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8.scaled_linear(fp8.quantised(x), matrix, None)
    x.copy_(random(100, 4096))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(out, eager)
    assert torch.equal(out, fp8.scaled_linear(fp8.quantised(x), matrix, None))
    assert torch.cuda.memory_allocated() - before < 64 << 20
