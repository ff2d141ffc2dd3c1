"""Steps in plain torch operations that have run when they are launched: the runner of CPUs."""

from __future__ import annotations

import torch

from prism.attention.kernels import BatchLayout, KvView
from prism.attention.torch_kernels import TorchKernels
from prism.engine.pieces import Pieces, Work
from prism.engine.sampler import Sampled, sample
from prism.engine.scheduler import Step
from prism.engine.sequence import Sequence
from prism.models.decoder import Decoder


class TorchFlight:
    """Launching it runs it."""

    def __init__(self, step: Step, sampled: tuple[Sequence, ...], work: Work) -> None:
        self.step = step
        self.sampled = sampled
        self.work = work
        self._pieces = Pieces(work)

    @property
    def is_begun(self) -> bool:
        """See `InFlight.is_begun`."""
        return self._pieces.is_begun

    @property
    def is_launched(self) -> bool:
        """See `InFlight.is_launched`."""
        return self._pieces.is_complete

    @torch.inference_mode()
    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`. All that is possible runs at once: a step on a CPU holds the loop anyway."""
        return self._pieces.advance(num_groups, float("inf"))

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        return self.is_launched

    def draws(self) -> list[Sampled]:
        """See `InFlight.draws`."""
        assert self.is_launched
        return self._pieces.drawn or []


class TorchRunner:
    """See the module's docstring."""

    def __init__(self, model: Decoder, kernels: TorchKernels, kv: KvView) -> None:
        self.model = model
        self.kernels = kernels
        self.kv = kv

    @torch.inference_mode()
    def run(self, step: Step, *, is_apart: bool = False) -> TorchFlight:
        """See `Runner.run`. Its steps share nothing, so all of them may be apart."""
        device = self.kernels.device
        tokens: list[int] = []
        last_rows: list[int] = []
        for sequence, start, length, samples in step.chunks:
            tokens += sequence.tokens[start : start + length]
            if samples:
                last_rows.append(len(tokens) - 1)
        ids = torch.tensor(tokens, dtype=torch.int64, device=device)
        rows = (
            torch.tensor(last_rows, dtype=torch.int64, device=device)
            if len(last_rows) < len(tokens)
            else None
        )
        sampled = tuple(chunk.sequence for chunk in step.chunks if chunk.samples)
        return TorchFlight(step, sampled, self._work(_layout(step), ids, rows, sampled))

    def _work(
        self, layout: BatchLayout, ids: torch.Tensor, rows: torch.Tensor | None, sampled: tuple[Sequence, ...]
    ) -> Work:
        model = self.model
        plan = self.kernels.plan(layout, self.kv, model.spec.num_heads)
        yield 1
        stream = yield from model.layers(self.kernels, plan, model.embedded(ids), rows)
        yield model.num_groups
        if not sampled:
            return None
        return sample(model.logits(self.kernels, stream).float(), sampled)


def _layout(step: Step) -> BatchLayout:
    """Copies of the tables: blocks may move before the step is launched, and are copied behind it."""
    return BatchLayout(
        query_lens=[chunk.length for chunk in step.chunks],
        context_lens=[chunk.start + chunk.length for chunk in step.chunks],
        tables=[list(chunk.sequence.blocks) for chunk in step.chunks],
        new_blocks=step.new_blocks,
    )
