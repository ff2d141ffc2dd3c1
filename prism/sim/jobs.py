"""A request in the simulator, from its arrival to its one end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from prism.costs import Costs
from prism.sim.ticks import to_seconds
from prism.types import ModelId, Rank, RequestId, Slo


class End(StrEnum):
    """How a request ended."""

    SERVED = "served"
    EXPIRED = "expired"
    """It had not started within the longest wait."""
    TIMED_OUT = "timed_out"
    """It was not done within the longest life of a request."""
    NO_PLACE = "no_place"
    """Its model fits nowhere."""
    TOO_LONG = "too_long"
    """Its model's memory could never hold it."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the trace: what it costs, how long its context is, what is promised."""

    model: ModelId
    shape: str
    """Name of its architecture."""
    costs: Costs
    context: int
    slo: Slo

    def weight_slabs(self, slab_bytes: int) -> int:
        """Those of weights and rotary table."""
        shape = self.costs.shape
        return -(-(shape.weight_bytes + self.context * shape.position_bytes) // slab_bytes)


@dataclass(slots=True, eq=False)
class Job:
    """One request with one choice. Times are ticks."""

    request_id: RequestId
    model: ModelId
    arrival: int
    prompt: int
    output: int
    """Tokens that it draws, the end of its text."""
    due: int
    """Its first token is."""
    is_clipped: bool = False
    """It was longer than its model's context."""
    produced: int = 0
    computed: int = 0
    """Tokens of the prompt, and of what was produced before it lost its place, that are in KV."""
    first_token: int | None = None
    last_token: int = 0
    is_admitted: bool = False
    is_late: bool = False
    """Admitted as one that cannot have its first token in time."""
    is_started: bool = False
    is_hopeful: bool = False
    """It came while its model was in memory, and could well have had its first token in time."""
    end: End | None = None
    end_time: int = 0
    num_restarts: int = 0
    is_again: bool = False
    """It has lost its blocks to others, and has not begun again."""
    rank: tuple[int, RequestId] = field(init=False)

    def __post_init__(self) -> None:
        self.rank = (self.arrival, self.request_id)

    @property
    def known(self) -> int:
        """Tokens that must be in KV before the next one is drawn."""
        return self.prompt + self.produced

    @property
    def missing(self) -> int:
        """Those of them that are not."""
        return self.prompt + self.produced - self.computed

    def finish(self, end: End, now: int) -> None:
        """The one end."""
        assert self.end is None, f"{self.request_id} ended twice"
        self.end = end
        self.end_time = now


def policy_rank(job: Job) -> Rank:
    """As the shipped policies see it."""
    return (to_seconds(job.arrival), job.request_id, 0)


class Chunk(NamedTuple):
    """Part of a prompt in a step."""

    job: Job
    length: int
    num_restarts: int
    """The job's when the step began: another number means that it has lost its place meanwhile."""
