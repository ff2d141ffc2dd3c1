"""Runs one engine's steps on the device: builds inputs, calls the model, draws tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prism.attention.kernels import BatchLayout, Kernels, KvView
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Step
from prism.engine.sequence import Sequence
from prism.models.decoder import Decoder


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step on the device and what it drew, in the order of `sampled`."""

    step: Step
    sampled: tuple[Sequence, ...]
    draws: list[Sampled]


class Runner:
    """Binds a model to its KV view and its lane's kernels."""

    def __init__(self, model: Decoder, kernels: Kernels, kv: KvView) -> None:
        self.model = model
        self.kernels = kernels
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: Step) -> InFlight:
        """Compute a step's KV and draw its tokens."""
        device = self.kernels.device
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for sequence, start, length, samples in step.chunks:
            tokens += sequence.tokens[start : start + length]
            positions += range(start, start + length)
            if samples:
                last_rows.append(len(tokens) - 1)
        plan = self.kernels.plan(_layout(step), self.kv, self.model.spec.num_heads)
        hidden = self.model.hidden(
            self.kernels,
            plan,
            torch.tensor(tokens, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
        )
        sampled = tuple(chunk.sequence for chunk in step.chunks if chunk.samples)
        draws: list[Sampled] = []
        if sampled:
            rows = torch.tensor(last_rows, device=device)
            draws = sample(self.model.logits(self.kernels, hidden[rows]), sampled)
        return InFlight(step, sampled, draws)


def _layout(step: Step) -> BatchLayout:
    return BatchLayout(
        query_lens=[chunk.length for chunk in step.chunks],
        context_lens=[chunk.start + chunk.length for chunk in step.chunks],
        tables=[chunk.sequence.blocks for chunk in step.chunks],
        new_blocks=step.new_blocks,
    )
