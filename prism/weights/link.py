"""The one way into a device, which all loads of the moment share.

Pieces are queued one by one: always the next one of the load that is due first, in turns where several are
due at the same time. Only as many are on their way as keep the link busy, so what becomes urgent waits for
those alone.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from prism.types import Bytes
from prism.weights.copiers import Copier, Copy, Wait
from prism.weights.transfers import Transfer

SWITCH_SECONDS = 0.0005
"""After which a thread gives up the interpreter when another one wants it, in a process with a link.

Python's own 5 ms are longer than what is on its way lasts: beside a loop that is busy for a millisecond at a
time, loads had the link for two fifths of the time. Nobody else waits longer for it.
"""


class Link(Protocol):
    """Carries transfers. Used by the threads of loads."""

    def start(self, transfer: Transfer) -> None:
        """Begin to copy; `transfer.has_ended` is set when it is over, well or not."""
        ...

    def wait(self, transfer: Transfer) -> None:
        """Until `transfer.has_ended`."""
        ...


class Candidate(NamedTuple):
    """A load with something left to copy."""

    deadline: float
    last_turn: int
    """Grows with every piece that the link takes from anybody; 0 if it had none so far."""


def choose(candidates: Sequence[Candidate]) -> int:
    """Place of the one whose piece is queued next: the earliest deadline, then who waits longest. Pure."""
    return min(range(len(candidates)), key=lambda i: candidates[i])


class _Flight(NamedTuple):
    """A piece on its way; with it, `transfer` has arrived up to `end`."""

    transfer: Transfer
    end: Bytes
    wait: Wait


class Traffic:
    """What is on a link. `step` and `close` belong to one thread; `add` may be called by any."""

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._new: deque[Transfer] = deque()
        self._copies: dict[Transfer, Copy] = {}
        self._flights: deque[_Flight] = deque()
        self._num_turns = 0

    def add(self, transfer: Transfer) -> None:
        """One more."""
        self._new.append(transfer)

    def step(self) -> bool:
        """Queue a piece, or wait for the oldest one; whether there was anything to do.

        Whatever goes wrong with a transfer ends that one alone, once nothing of it is on its way.
        """
        while self._new:
            self._begin(self._new.popleft())
        copying = [transfer for transfer in self._copies if transfer.is_copying]
        if copying and len(self._flights) < self._copier.depth:
            self._queue(copying[choose([Candidate(t.deadline, t.last_turn) for t in copying])])
        elif self._flights:
            self._land(self._flights.popleft())
        else:
            self._end_finished()
            return False
        self._end_finished()
        return True

    def cancel_all(self) -> None:
        """Have everything end soon."""
        while self._new:
            self._new.popleft().abandon()
        for transfer in self._copies:
            transfer.cancel()

    def _begin(self, transfer: Transfer) -> None:
        try:
            self._copies[transfer] = self._copier.begin(transfer.total, transfer.places)
        except Exception as error:
            transfer.error = error
            transfer.has_ended.set()

    def _queue(self, transfer: Transfer) -> None:
        self._num_turns += 1
        transfer.last_turn = self._num_turns
        piece = transfer.take_piece(self._copier.chunk_bytes)
        try:
            wait = self._copies[transfer].copy(piece)
        except Exception as error:
            transfer.error = error
            self._settle()  # the piece may be on its way all the same, and its slab is given back soon
            return
        self._flights.append(_Flight(transfer, Bytes(piece.begin + piece.size), wait))

    def _settle(self) -> None:
        """Wait for all pieces. A device that cannot even tell has failed altogether: steps will notice."""
        with suppress(Exception):
            self._copier.settle()

    def _land(self, flight: _Flight) -> None:
        try:
            flight.wait()
        except Exception as error:
            flight.transfer.error = flight.transfer.error or error
            self._settle()
        if flight.transfer.error is None:  # else what came before may be missing
            flight.transfer.arrived = flight.end

    def _end_finished(self) -> None:
        """End what has arrived or been given up, unless something of it is still on its way."""
        flying = {flight.transfer for flight in self._flights}
        for transfer in [t for t in self._copies if not t.is_copying and t not in flying]:
            copy = self._copies.pop(transfer)
            if transfer.error is None and transfer.has_arrived:
                try:
                    transfer.verify(copy.checksums())
                except Exception as error:
                    transfer.error = error
            transfer.has_ended.set()


class ThreadLink:
    """A link with a thread of its own, which the interpreter lets run in time (`SWITCH_SECONDS`)."""

    def __init__(self, copier: Copier) -> None:
        sys.setswitchinterval(SWITCH_SECONDS)
        self._traffic = Traffic(copier)
        self._has_work = threading.Event()
        self._lock = threading.Lock()
        """Nothing is added once the thread has been told to end."""
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def start(self, transfer: Transfer) -> None:
        """See `Link.start`."""
        with self._lock:
            if self._is_closing:
                transfer.abandon()
                return
            self._traffic.add(transfer)
        self._has_work.set()

    def wait(self, transfer: Transfer) -> None:
        """See `Link.wait`."""
        transfer.has_ended.wait()

    def close(self) -> None:
        """Cancel what is on its way and end the thread; returns when nothing is copied any more."""
        with self._lock:
            self._is_closing = True
        self._has_work.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._has_work.wait()
            self._has_work.clear()
            while not self._is_closing and self._traffic.step():
                pass
            if self._is_closing:
                self._traffic.cancel_all()
                while self._traffic.step():
                    pass
                return
