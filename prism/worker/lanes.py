"""Lanes: what runs on a device one after the other, and what of it is still queued."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from prism.engine.runner import InFlight
from prism.engine.scheduler import Slots
from prism.types import LaneId, ModelId, Stamp


class Work(Protocol):
    """Something queued on a lane: a step, or a copy of blocks."""

    def is_done(self) -> bool:
        """It has run."""
        ...


class Flight(NamedTuple):
    """Queued work; `step` is what to commit, and whose, unless it was a copy."""

    number: int
    work: Work
    model: ModelId
    step: InFlight | None
    begin: float
    """When a step was queued."""

    @property
    def has_prompts(self) -> bool:
        """It is a step with chunks of prompts."""
        return self.step is not None and self.step.step.has_prompts

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of those chunks."""
        return 0 if self.step is None else self.step.step.num_prompt_tokens


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
        self.flights: deque[Flight] = deque()

    def stamp(self) -> Stamp:
        """Names the last work that has been queued."""
        return Stamp(self.lane_id, self.num_queued)

    def queue(self, model: ModelId, work: Work, step: InFlight | None = None, begin: float = 0.0) -> None:
        """Count work that is on the device."""
        self.num_queued += 1
        self.flights.append(Flight(self.num_queued, work, model, step, begin))

    def finished(self) -> Iterator[Flight]:
        """Takes out, in order, what has run."""
        while self.flights and self.flights[0].work.is_done():
            flight = self.flights.popleft()
            self.num_completed = flight.number
            yield flight

    @property
    def num_steps(self) -> int:
        """Steps that are queued, copies not counted."""
        return sum(flight.step is not None for flight in self.flights)
