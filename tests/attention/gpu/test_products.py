"""Kernels of products that are loaded ahead are those that products use."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from prism.modelspec import ModelSpec, read_spec
from prism.types import Quantization
from prism.weights.layout import plan_layout

pytestmark = pytest.mark.gpu

SHAPE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "vocab_size": 50_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


def spec_of(folder: Path, quantization: Quantization = "none") -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return read_spec(folder, quantization=quantization)


def test_products_are_those_of_the_layout(tmp_path: Path) -> None:
    from prism.attention.gpu.products import products_of

    spec = spec_of(tmp_path)
    entries = {entry.name: entry for entry in plan_layout(spec).entries}
    names = ("qkv", "o", "gate_up", "down")
    matrices = [entries[f"layers.0.{name}"] for name in names] + [entries["lm_head"]]
    products = products_of(spec)
    assert [(p.channels, p.width) for p in products] == [tuple(m.shape) for m in matrices]
    biased = [f"layers.0.{name}_bias" in entries for name in names] + [False]
    assert [p.has_bias for p in products] == biased and biased[0]
    assert not any(p.is_fp8 for p in products)
    fp8 = products_of(replace(spec, quantization="fp8"))
    assert [p.is_fp8 for p in fp8] == [True] * 4 + [False]


PROGRAM = """
import sys
from pathlib import Path
from time import perf_counter

import torch

from prism.attention.gpu.kernels import GpuKernels
from prism.attention.gpu.products import Products, products_of
from prism.attention.kernels import Stream, Weight
from prism.engine.gpu.graphs import row_numbers
from prism.memory.cuda_calls import CudaCalls
from prism.modelspec import read_spec

spec = read_spec(Path(sys.argv[1]), quantization=sys.argv[2])
scratch = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
kernels = GpuKernels(torch.device("cuda"), torch.zeros(1, 1, dtype=torch.int32, device="cuda"), scratch)


def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def weight(product):
    values = random(product.channels, product.width)
    if product.is_fp8:
        return Weight(values.to(torch.float8_e4m3fn), torch.ones(product.channels, device="cuda"))
    return Weight(values)


def num_slow(numbers):
    count = 0
    for rows in numbers:
        for product, matrix, bias in weights:
            x, residual = random(rows, product.width), Stream(random(rows, product.channels))
            torch.cuda.synchronize()
            begin = perf_counter()
            if product.is_added:
                kernels.add_linear(residual, x, matrix, bias)
            else:
                kernels.norm_linear(Stream(x), x[0], 1e-5, matrix, bias)
            count += perf_counter() - begin > 0.002
    return count


with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
    weights = [
        (product, weight(product), random(product.channels) if product.has_bias else None)
        for product in products_of(spec)
    ]
    num_slow([3, 40, 2049])  # the kernels around the products, torch's own, and room for results
    numbers = row_numbers(256, 2048)[1:]
    if sys.argv[3] == "ahead":
        for _ in Products(torch.cuda.Stream(), CudaCalls(), products_of(spec), torch.bfloat16).load(numbers):
            pass
    print(num_slow(numbers))
"""


@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_no_product_waits_for_its_kernel(quantization: Quantization, tmp_path: Path) -> None:
    """Each in a process of its own: what others have used is there already."""
    spec_of(tmp_path)
    num_slow = []
    for case in ("unprepared", "ahead"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), quantization, case]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        num_slow.append(int(done.stdout))
    assert num_slow[0] >= 20, "these products need kernels, 3.5 ms or more each"
    assert num_slow[1] <= num_slow[0] // 10
