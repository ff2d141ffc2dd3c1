"""Steps in plain torch operations that have run when `run` returns: the runner of CPUs."""

from __future__ import annotations

import torch

from prism.attention.kernels import BatchLayout, KvView
from prism.attention.torch_kernels import TorchKernels
from prism.engine.runner import Done
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Step
from prism.models.decoder import Decoder


class TorchRunner:
    """See the module's docstring."""

    def __init__(self, model: Decoder, kernels: TorchKernels, kv: KvView) -> None:
        self.model = model
        self.kernels = kernels
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: Step) -> Done:
        """See `Runner.run`."""
        device = self.kernels.device
        tokens: list[int] = []
        last_rows: list[int] = []
        for sequence, start, length, samples in step.chunks:
            tokens += sequence.tokens[start : start + length]
            if samples:
                last_rows.append(len(tokens) - 1)
        plan = self.kernels.plan(_layout(step), self.kv, self.model.spec.num_heads)
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        stream = self.model.layers(self.kernels, plan, self.model.embedded(ids))
        sampled = tuple(chunk.sequence for chunk in step.chunks if chunk.samples)
        draws: list[Sampled] = []
        if sampled:
            rows = torch.tensor(last_rows, device=device)
            draws = sample(self.model.logits(self.kernels, stream.rows(rows)).float(), sampled)
        return Done(step, sampled, draws)


def _layout(step: Step) -> BatchLayout:
    return BatchLayout(
        query_lens=[chunk.length for chunk in step.chunks],
        context_lens=[chunk.start + chunk.length for chunk in step.chunks],
        tables=[chunk.sequence.blocks for chunk in step.chunks],
        new_blocks=step.new_blocks,
    )
