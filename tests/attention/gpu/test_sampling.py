"""Random draws on the GPU against the same in torch."""

from __future__ import annotations

import pytest
import torch

from prism.engine.sampler import draw

pytestmark = pytest.mark.gpu

ROWS = 64
KINDS = {
    "plain": (0, 1.0, 0.0),
    "top_k": (40, 1.0, 0.0),
    "one": (1, 1.0, 0.0),
    "top_p": (0, 0.9, 0.0),
    "least": (0, 1e-6, 0.0),
    "min_p": (0, 1.0, 0.05),
    "all": (200, 0.8, 0.01),
    "more than there are": (10**6, 0.95, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [100, 32_000, 128_256])
def test_draws_are_those_of_torch(dtype: torch.dtype, kind: str, vocab: int) -> None:
    """But for one of them, whose uniform number may lie on the edge between two tokens."""
    from prism.attention.gpu.sampling import draw_random

    top_k, top_p, min_p = KINDS[kind]
    generator = torch.Generator("cuda").manual_seed(vocab)
    logits = (3 * torch.randn(ROWS + 3, vocab, device="cuda", generator=generator)).to(dtype)
    rows = torch.randperm(ROWS + 3, device="cuda", generator=generator)[:ROWS].int()
    places = torch.cat([rows, rows.new_tensor([-1, -1])])
    numbers = {
        "temperature": torch.rand(ROWS + 2, device="cuda", generator=generator) + 0.1,
        "top_k": torch.full((ROWS + 2,), top_k, device="cuda", dtype=torch.int32),
        "top_p": torch.full((ROWS + 2,), top_p, device="cuda"),
        "min_p": torch.full((ROWS + 2,), min_p, device="cuda"),
        "uniforms": torch.rand(ROWS + 2, device="cuda", dtype=torch.float64, generator=generator),
    }
    slots = torch.arange(ROWS + 3, device="cuda", dtype=torch.int32).flip(0)
    out = torch.full((ROWS + 3,), -1, device="cuda", dtype=torch.int32)
    last_tokens = torch.full((ROWS + 3,), -1, device="cuda", dtype=torch.int32)
    draw_random(logits, places, slots=slots, out=out, last_tokens=last_tokens, **numbers)
    wanted = draw(logits[rows.long()], are_cut=True, **{name: n[:ROWS] for name, n in numbers.items()})
    assert int((out[rows.long()] != wanted).sum()) <= 1
    assert bool((last_tokens[slots.long()] == out).all())
    assert int((out == -1).sum()) == 3, "rows that are not drawn keep what they have"
