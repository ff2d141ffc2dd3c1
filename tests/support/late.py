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
from prism.engine.runner import Runner
from prism.engine.sampler import Sampled
from prism.engine.scheduler import UNBOUNDED, Step
from prism.engine.sequence import Sequence as Choice
from prism.engine.torch_runner import TorchRunner
from prism.models.decoder import Decoder
from prism.types import LaneId
from prism.worker.copies import Run
from prism.worker.cpu_device import TorchBackend, copy_runs
from prism.worker.lanes import Work

LOOKS = 3
COPY_LOOKS = 12


class LateFlight:
    """Done at the `LOOKS`th look."""

    def __init__(self, step: Step, sampled: tuple[Choice, ...], drawn: list[Sampled]) -> None:
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
        self._late: dict[Choice, list[int]] = defaultdict(list)

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
