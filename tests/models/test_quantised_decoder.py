"""Logits over fp8 weights are those of transformers over weights that have been through fp8 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism.attention.kernels import BatchLayout
from prism.attention.torch_kernels import TorchKernels
from prism.engine.kv_layout import plan_kv_layout
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.models.decoder import Decoder, at_once
from prism.models.rotary import rotary_table
from prism.modelspec import read_spec
from prism.types import BlockId, Bytes, MiB, ModelId, Quantization
from prism.weights.client import pack_here
from prism.weights.layout import plan_layout
from prism.weights.protocol import WeightSource
from prism.weights.views import view_weights
from prism.worker.cpu_device import cpu_device
from tests.support.checkpoints import FAMILIES, fake_quantise, make_model, prompts, save

SLAB = Bytes(2 * MiB)
CPU = torch.device("cpu")


@torch.inference_mode()
def logits_of(path: Path, quantization: Quantization, prompt: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]`, in a chunk and single tokens."""
    spec = read_spec(path, quantization=quantization)
    layout = plan_kv_layout(spec, SLAB)
    assert layout is not None
    device = cpu_device(driver := HostDriver(Bytes(2 * SLAB)), SlabPool(driver, SLAB, 2), "cpu:0")
    blocks = [BlockId(i * layout.block_bytes // layout.unit) for i in range(layout.num_blocks(len(prompt)))]
    kernels = TorchKernels(CPU)
    rows = []
    with pack_here(WeightSource(model=ModelId("m"), path=str(path), quantization=quantization)) as packed:
        tensors = view_weights(plan_layout(spec), packed.address, CPU)
        decoder = Decoder(spec, tensors, rotary_table(spec.rope, spec.head_dim, spec.max_position))
        first = len(prompt) - 5
        for start, end in ((0, first), *((i, i + 1) for i in range(first, len(prompt)))):
            batch = BatchLayout([end - start], [end], [blocks], tuple(blocks) if start == 0 else ())
            plan = kernels.plan(batch, device.kv_view(spec, layout), spec.num_heads)
            stream = at_once(decoder.layers(kernels, plan, decoder.embedded(torch.tensor(prompt[start:end]))))
            rows.append(decoder.logits(kernels, stream).clone())
    device.close()
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [{}, {"tie_word_embeddings": True}], ids=["", "tied"])
def test_logits(family: str, extra: dict[str, Any], tmp_path: Path) -> None:
    if family == "qwen3":
        extra = {}  # always tied
    model = make_model(family, **extra)
    path = save(model, tmp_path)
    prompt = prompts(3, 60, seed=2)[-1] + [1] * 8
    with torch.inference_mode():
        plain = model(torch.tensor([prompt])).logits[0]
        expected = fake_quantise(model)(torch.tensor([prompt])).logits[0]
    actual = logits_of(path, "fp8", prompt)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))
    torch.testing.assert_close(
        logits_of(path, "none", prompt), plain, rtol=1e-3, atol=2e-4 * float(plain.abs().max())
    )
    error = float((actual - plain).norm() / plain.norm())
    assert 0.01 < error < 0.2, "fp8 makes a difference, and not a large one"
