"""A CPU that behaves like a GPU: steps are queued, their tokens are known only some looks later."""

from __future__ import annotations

from collections import defaultdict

import torch

from prism.attention.kernels import KvView
from prism.engine.runner import Runner
from prism.engine.sampler import Sampled
from prism.engine.scheduler import UNBOUNDED, Step
from prism.engine.sequence import Sequence
from prism.engine.torch_runner import TorchRunner
from prism.models.decoder import Decoder
from prism.types import LaneId
from prism.worker.cpu_device import TorchBackend

LOOKS = 3


class LateFlight:
    """Done at the `LOOKS`th look."""

    def __init__(self, step: Step, sampled: tuple[Sequence, ...], drawn: list[Sampled]) -> None:
        self.step = step
        self.sampled = sampled
        self._drawn = drawn
        self._looks = 0

    def is_done(self) -> bool:
        self._looks += 1
        return self._looks >= LOOKS

    def draws(self) -> list[Sampled]:
        return self._drawn


class LateRunner:
    """Computes at once, as queued steps do in their order, with tokens that only it knows."""

    def __init__(self, inner: TorchRunner) -> None:
        self.kv = inner.kv
        self._inner = inner
        self._late: dict[Sequence, list[int]] = defaultdict(list)

    def run(self, step: Step) -> LateFlight:
        shown = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            unknown = sequence.num_pending - chunk.samples
            assert not (unknown and sequence.needs_history)
            tokens = self._late[sequence][-unknown:] if unknown else []
            shown.append((sequence, len(tokens), sequence.num_pending))
            sequence.tokens += tokens
            sequence.num_pending = int(chunk.samples)
        done = self._inner.run(step)
        for sequence, count, pending in shown:
            sequence.num_pending = pending
            if count:
                del sequence.tokens[-count:]
        for sequence, draw in zip(done.sampled, done.drawn, strict=True):
            self._late[sequence].append(draw.token)
        return LateFlight(step, done.sampled, done.drawn)


class LateBackend(TorchBackend):
    """Two lanes of late steps."""

    num_lanes = 2
    max_sequences = 64
    max_entries = UNBOUNDED

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        inner = super().runner(model, kv, lane)
        assert isinstance(inner, TorchRunner)
        return LateRunner(inner)
