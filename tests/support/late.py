"""A CPU that behaves like a GPU: steps are queued, their tokens are known only some looks later.

Copies to host memory that are made aside read what they read as late as they may: when somebody sees that
they have run, or is queued to wait for them.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import torch

from prism.attention.kernels import KvView
from prism.engine.pieces import Pieces
from prism.engine.runner import Runner
from prism.engine.sampler import NOTHING, Sampled
from prism.engine.scheduler import UNBOUNDED
from prism.engine.sequence import Sequence as Choice
from prism.engine.step import Step
from prism.engine.torch_runner import TorchFlight, TorchRunner
from prism.models.decoder import Decoder
from prism.types import LaneId
from prism.worker.copies import Run
from prism.worker.cpu_device import TorchBackend, copy_runs
from prism.worker.lanes import Work

LOOKS = 3
COPY_LOOKS = 12


class LateFlight:
    """Launched one piece at a time; done at the `LOOKS`th look after that."""

    def __init__(self, inner: TorchFlight, known: dict[Choice, list[int]]) -> None:
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
            tokens = (self._pieces.drawn or NOTHING).tokens
            for sequence, token in zip(self.sampled, tokens, strict=True):
                self._known[sequence].append(token)
        return has_advanced

    def is_done(self) -> bool:
        assert self.is_launched, "nobody can ask for an event that has not been recorded"
        self._looks += 1
        return self._looks >= LOOKS

    def draws(self) -> Sampled:
        assert self._looks >= LOOKS
        return self._pieces.drawn or NOTHING


class LateRunner:
    """Computes what is launched, with tokens that only it knows; they are told late."""

    def __init__(self, inner: TorchRunner) -> None:
        self.kv = inner.kv
        self._inner = inner
        self._late: dict[Choice, list[int]] = defaultdict(list)

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


class LateCopies:
    """Done at the `COPY_LOOKS`th look, and run no earlier, unless something is queued that waits for them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = tuple(runs)
        self._looks = 0
        self._has_run = False

    def run(self) -> None:
        if not self._has_run:
            self._has_run = True
            copy_runs(self.runs)

    def is_done(self) -> bool:
        self._looks += 1
        if self._looks >= COPY_LOOKS:
            self.run()
        return self._looks >= COPY_LOOKS

    def seconds(self) -> float:
        return 0.0


class LateFetches(LateCopies):
    """Run at once, since what follows on the lane is computed at once; nobody may write to their sources
    before they are done."""

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__(runs)
        self.run()
        self._seen = [ctypes.string_at(source, size) for source, _, size in self.runs]

    def is_done(self) -> bool:
        for (source, _, size), seen in zip(self.runs, self._seen, strict=True):
            assert ctypes.string_at(source, size) == seen, "a place in host memory was reused too early"
        return super().is_done()


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

    def copy_out(self, runs: Sequence[Run], lane: LaneId, *, aside: bool) -> LateCopies:
        copies = LateCopies(runs)
        if not aside:
            copies.run()
        return copies

    def copy_in(self, runs: Sequence[Run], lane: LaneId) -> LateCopies:
        return LateFetches(runs)

    def wait_for(self, lane: LaneId, works: Sequence[Work]) -> None:
        for work in works:
            if isinstance(work, LateCopies):
                work.run()
