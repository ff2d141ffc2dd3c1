"""Copies of KV between a GPU and registered host memory.

A GPU has one engine for each direction, which stays with a stream for as long as it has copies: a gibibyte
held up the tokens of all lanes for 19 ms, whether queued at once or with always one piece behind the running
one. So what leaves aside is queued piece by piece, each when the one before has been seen to have run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from prism.memory.cuda import CudaDriver
from prism.types import Bytes, MiB
from prism.worker.copies import Run

PIECE = Bytes(16 * MiB)
"""0.3 ms of a PCIe 5 link."""
DEPTH = 1
"""Pieces on their way: what else leaves the device waits for these at most."""


class Copies:
    """Copies queued on a stream, behind what is there."""

    def __init__(self, driver: CudaDriver, runs: Sequence[Run], stream: torch.cuda.Stream) -> None:
        self._begin = _recorded(stream)
        driver.copy_async(runs, stream.cuda_stream)
        self._end = _recorded(stream)

    def is_done(self) -> bool:
        """They have run."""
        return bool(self._end.query())  # type: ignore[no-untyped-call]

    def hold(self, stream: torch.cuda.Stream) -> None:
        """What is queued on the stream from now on runs behind them."""
        stream.wait_event(self._end)

    def seconds(self) -> float:
        """See `CopyWork.seconds`."""
        return _seconds(self._begin, self._end)


class SwapStream:
    """A stream for copies that nobody waits for, `DEPTH` pieces at a time; who looks has more queued."""

    def __init__(self, driver: CudaDriver, device: torch.device) -> None:
        self._driver = driver
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._leaving: deque[Leaving] = deque()
        self._flying: deque[torch.cuda.Event] = deque()

    def start(self, runs: Sequence[Run], behind: torch.cuda.Stream) -> Leaving:
        """Copies that run behind what is queued on a stream, and behind those started earlier."""
        work = Leaving(self, _pieces(runs), behind.record_event())
        self._leaving.append(work)
        self.advance()
        return work

    def advance(self) -> None:
        """Queue what may be queued now."""
        while self._flying and self._flying[0].query():  # type: ignore[no-untyped-call]
            self._flying.popleft()
        while self._leaving and len(self._flying) < DEPTH:
            self._queue_next()

    def queue_all(self, work: Leaving) -> None:
        """Queue these copies and all before them, because a stream is to wait for them."""
        while work in self._leaving:
            self._queue_next()

    def _queue_next(self) -> None:
        work = self._leaving[0]
        if work.begin is None:
            self.stream.wait_event(work.behind)
            work.begin = _recorded(self.stream)
        self._driver.copy_async(work.pieces.popleft(), self.stream.cuda_stream)
        work.event = _recorded(self.stream)
        self._flying.append(work.event)
        if not work.pieces:
            self._leaving.popleft()


class Leaving:
    """Copies on a swap stream."""

    def __init__(self, swap: SwapStream, pieces: deque[list[Run]], behind: torch.cuda.Event) -> None:
        self._swap = swap
        self.pieces = pieces
        self.behind = behind
        self.begin: torch.cuda.Event | None = None
        self.event: torch.cuda.Event | None = None
        """Of the newest piece that was queued."""

    def is_done(self) -> bool:
        """All pieces have run."""
        self._swap.advance()
        return not self.pieces and self.event is not None and bool(self.event.query())  # type: ignore[no-untyped-call]

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Have all of it queued now; what is queued on the stream from now on runs behind it."""
        self._swap.queue_all(self)
        assert self.event is not None
        stream.wait_event(self.event)

    def seconds(self) -> float:
        """See `CopyWork.seconds`."""
        assert self.begin is not None and self.event is not None
        return _seconds(self.begin, self.event)


def _pieces(runs: Sequence[Run]) -> deque[list[Run]]:
    """In order, `PIECE` bytes at most in each unless a single copy is larger."""
    pieces: deque[list[Run]] = deque()
    size = 0
    for run in runs:
        if not pieces or size + run.size > PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(run)
        size += run.size
    return pieces


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    elapsed: float = begin.elapsed_time(end)
    return elapsed / 1e3
