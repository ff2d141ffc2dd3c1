"""Random draws of large batches."""

from __future__ import annotations

import pytest
import torch

from prism.engine.sampler import draw


@pytest.mark.gpu
@pytest.mark.parametrize("are_cut", [False, True])
def test_a_large_batch_takes_little_memory(are_cut: bool) -> None:
    """600 rows of 131,072 logits took over 4 GiB, which is all that torch's allocator may have."""
    rows, vocab = 600, 131_072
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, vocab, device="cuda", generator=generator, dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tokens = draw(
        logits,
        temperature=torch.full((rows,), 0.8, device="cuda"),
        top_k=torch.full((rows,), 50 if are_cut else 0, device="cuda", dtype=torch.int32),
        top_p=torch.full((rows,), 0.9 if are_cut else 1.0, device="cuda"),
        min_p=torch.zeros(rows, device="cuda"),
        uniforms=torch.rand(rows, device="cuda", dtype=torch.float64, generator=generator),
        are_cut=are_cut,
    )
    assert torch.cuda.max_memory_allocated() - before < 1 << 30
    if are_cut:
        best = logits.float().topk(50, dim=-1).values[:, -1]
        assert bool((logits.float().gather(1, tokens[:, None])[:, 0] >= best).all())
