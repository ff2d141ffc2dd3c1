"""Logits over fp8 weights are those of transformers over weights that have been through fp8 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prism.models.decoder import at_once
from prism.types import Quantization
from tests.support.checkpoints import FAMILIES, fake_quantise, make_model, prompts, save
from tests.support.decoders import cpu_decoder


def logits_of(path: Path, quantization: Quantization, prompt: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]`, in a chunk and single tokens."""
    first = len(prompt) - 5
    chunks = [(0, first), *((i, i + 1) for i in range(first, len(prompt)))]
    with cpu_decoder(path, quantization) as model:
        sequence = model.add(len(prompt))
        streams = (at_once(model.layers(sequence, prompt[start:end], start)) for start, end in chunks)
        return torch.cat([model.logits(stream) for stream in streams])


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
