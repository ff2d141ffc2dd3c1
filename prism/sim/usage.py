"""What a model has asked of its device, as workers count it; mirrors `worker/usage.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from prism.sim.jobs import Job
from prism.sim.ticks import PER_SECOND

PARTS = lcm(*range(1, 9))
"""Of a tick: steps that run side by side, on eight lanes at most, share the device's time evenly."""


@dataclass(slots=True)
class Usage:
    """Counters of one model; they only grow, and do not depend on how often they are looked at."""

    num_requests: int = 0
    """That started."""
    prompt_tokens: int = 0
    """Theirs."""
    decoded_tokens: int = 0
    _parts: int = 0

    def starting(self, jobs: Iterable[Job]) -> None:
        """A step computes part of their prompts: they start, unless they have before."""
        for job in jobs:
            if not job.is_started:
                job.is_started = True
                self.num_requests += 1
                self.prompt_tokens += job.prompt

    def add_ticks(self, ticks: int, width: int) -> None:
        """Its steps have taken so long, with so many lanes side by side."""
        self._parts += ticks * PARTS // width

    @property
    def device_seconds(self) -> float:
        """The part of the device's time that its steps had."""
        return self._parts / (PARTS * PER_SECOND)
