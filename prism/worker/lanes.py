"""Lanes: what runs on a device one after the other, and what of it is still queued."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prism.engine.runner import InFlight
from prism.engine.scheduler import Slots
from prism.types import LaneId, ModelId, Stamp

if TYPE_CHECKING:  # which knows models, and these their lane
    from prism.worker.cost_book import Expected


class Work(Protocol):
    """Something queued on a lane: a step, or a copy of blocks."""

    def is_done(self) -> bool:
        """It has run."""
        ...


class Deferred:
    """A copy that is queued once the step before it has been launched in full."""

    def __init__(self, queue: Callable[[], Work]) -> None:
        self._queue = queue
        self.queued: Work | None = None

    def launch(self) -> None:
        """Queue it."""
        self.queued = self._queue()

    def is_done(self) -> bool:
        """It has run."""
        return self.queued is not None and self.queued.is_done()


@dataclass(slots=True, eq=False)
class Flight:
    """Work on its way; `step` is what to commit, and whose, unless it was a copy."""

    model: ModelId
    work: Work
    step: InFlight | None
    begin: float = 0.0
    """When a step was queued, or later: when what it runs behind on other lanes was seen to have run."""
    expected: Expected | None = None
    """What a step is to take."""
    after: tuple[Flight, ...] = ()
    """Work of other lanes that it runs behind, as long as any of it has not run."""
    is_in_turn: bool = False
    """The device knows of it."""
    is_apart: bool = False
    """It was launched behind weights that arrived: how long it took says nothing."""
    is_beside: bool = False
    """Pieces of a step that is apart may run beside it, or before it in its time."""
    number: int = 0
    """Its place in the lane's count; 0 before it has one."""
    has_run: bool = False

    @property
    def has_prompts(self) -> bool:
        """It is a step with chunks of prompts."""
        return self.step is not None and self.step.step.has_prompts

    @property
    def is_launched(self) -> bool:
        """All of it is on the device."""
        if self.step is not None:
            return self.step.is_launched
        return not isinstance(self.work, Deferred) or self.work.queued is not None

    @property
    def queued(self) -> Work:
        """What is on the device of it."""
        if not isinstance(self.work, Deferred):
            return self.work
        assert self.work.queued is not None
        return self.work.queued

    @property
    def may_be_launched(self) -> bool:
        """What it runs behind is on the device: what is not there cannot be waited for."""
        return all(other.is_launched for other in self.after)

    def look(self, now: float) -> None:
        """Note whether it can run by now, as far as other lanes go."""
        if self.after and all(other.has_run for other in self.after):
            self.after = ()
            self.begin = max(self.begin, now)


class Lane:
    """Work that runs one after the other, and its count: queued and completed."""

    def __init__(self, lane_id: LaneId, slots: Slots) -> None:
        self.lane_id = lane_id
        self.slots = slots
        self.num_queued = 0
        self.num_completed = 0
        self.num_models = 0
        self.last_end = 0.0
        """When its latest step was seen to have run."""
        self._has_pieces = False
        """Pieces of a step that is apart wait behind what is queued."""
        self.flights: deque[Flight] = deque()
        self._last_apart = 0

    def stamp(self) -> Stamp:
        """Names the last work that has been queued."""
        return Stamp(self.lane_id, self.num_queued)

    def queue(self, model: ModelId, work: Work, step: InFlight | None = None, begin: float = 0.0) -> Flight:
        """Count work that is on the device, or launched before anything that is queued later."""
        flight = Flight(model, work, step, begin)
        if step is not None:
            flight.is_beside, self._has_pieces = self._has_pieces, False
        self.append(flight)
        return flight

    def append(self, flight: Flight) -> None:
        """See `queue`."""
        self.num_queued += 1
        flight.number = self.num_queued
        self.flights.append(flight)

    def append_apart(self, flight: Flight) -> None:
        """Queue what has been launched between other work, or marks its end."""
        self.append(flight)
        self._last_apart = flight.number

    def launched_apart(self, lanes: Iterable[Lane]) -> None:
        """Pieces of a step that is apart have been launched on this one of the device's lanes."""
        self._has_pieces = self._has_pieces or bool(self.flights)
        for lane in lanes:
            for flight in lane.flights if lane is not self else ():
                flight.is_beside = True

    @property
    def is_apart_free(self) -> bool:
        """What such work shares with its like on the lane is not in use any more."""
        return self._last_apart <= self.num_completed

    @property
    def launching(self) -> Flight | None:
        """The oldest work that is not on the device in full. All behind it waits, since order matters."""
        for flight in self.flights:
            if not flight.is_launched:
                return flight
        return None

    def finished(self) -> Iterator[Flight]:
        """Takes out, in order, what has run."""
        while self.flights and self.flights[0].is_launched and self.flights[0].work.is_done():
            flight = self.flights.popleft()
            self.num_completed = flight.number
            flight.has_run = True
            flight.after = ()
            yield flight

    @property
    def steps(self) -> list[Flight]:
        """Those that are queued, without copies."""
        return [flight for flight in self.flights if flight.step is not None]

    def earliest_end(self, flight: Flight) -> float:
        """Of its oldest step, if nothing that runs beside holds it up; infinite before it can run."""
        least = 0.0 if flight.expected is None else flight.expected.least
        return float("inf") if flight.after else max(flight.begin, self.last_end) + least


def had_device_alone(flight: Flight, begin: float, lane: Lane, lanes: Iterable[Lane]) -> bool:
    """Whether no step of another lane has run beside a step of this one, which began then and has just run.

    Who waits behind it on another lane has not begun.
    """
    return not flight.is_beside and all(
        other.last_end <= begin and all(flight in step.after for step in other.steps)
        for other in lanes
        if other is not lane
    )
