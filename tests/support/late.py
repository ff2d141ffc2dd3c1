"""A CPU that behaves like a GPU: steps are queued, their tokens are known only some looks later."""

from __future__ import annotations

from collections import defaultdict

import torch

from prism.attention.kernels import KvView
from prism.engine.pieces import Pieces
from prism.engine.runner import Runner
from prism.engine.sampler import Sampled
from prism.engine.scheduler import Step
from prism.engine.sequence import Sequence
from prism.engine.torch_runner import TorchFlight, TorchRunner
from prism.models.decoder import Decoder
from prism.types import LaneId
from prism.worker.cpu_device import TorchBackend

LOOKS = 3


class LateFlight:
    """Launched one piece at a time; done at the `LOOKS`th look after that."""

    def __init__(self, inner: TorchFlight, known: dict[Sequence, list[int]]) -> None:
        self.step = inner.step
        self.sampled = inner.sampled
        self._pieces = Pieces(inner.work)
        self._known = known
        self._looks = 0

    @property
    def is_begun(self) -> bool:
        return self._pieces.is_begun

    @property
    def is_launched(self) -> bool:
        return self._pieces.is_complete

    @torch.inference_mode()
    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        seconds = seconds if seconds == float("inf") else 0.0
        has_advanced = self._pieces.advance(num_groups, seconds)
        if has_advanced and self.is_launched:
            for sequence, draw in zip(self.sampled, self._pieces.drawn or (), strict=True):
                self._known[sequence].append(draw.token)
        return has_advanced

    def is_done(self) -> bool:
        assert self.is_launched, "nobody can ask for an event that has not been recorded"
        self._looks += 1
        return self._looks >= LOOKS

    def draws(self) -> list[Sampled]:
        assert self._looks >= LOOKS
        return self._pieces.drawn or []


class LateRunner:
    """Computes what is launched, with tokens that only it knows; they are told late."""

    def __init__(self, inner: TorchRunner) -> None:
        self.kv = inner.kv
        self._inner = inner
        self._late: dict[Sequence, list[int]] = defaultdict(list)

    def run(self, step: Step, *, is_apart: bool = False) -> LateFlight:
        shown = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            unknown = sequence.num_pending - chunk.samples
            assert not (unknown and sequence.needs_history)
            tokens = self._late[sequence][-unknown:] if unknown else []
            assert len(tokens) == unknown, "made before the step before it had been launched"
            shown.append((sequence, len(tokens), sequence.num_pending))
            sequence.tokens += tokens
            sequence.num_pending = int(chunk.samples)
        flight = self._inner.run(step, is_apart=is_apart)
        for sequence, count, pending in shown:
            sequence.num_pending = pending
            if count:
                del sequence.tokens[-count:]
        return LateFlight(flight, self._late)


class LateBackend(TorchBackend):
    """Two lanes of late steps."""

    num_lanes = 2
    max_sequences = 64

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        inner = super().runner(model, kv, lane)
        assert isinstance(inner, TorchRunner)
        return LateRunner(inner)
