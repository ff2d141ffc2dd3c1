"""What a model has asked of its device, as workers count it; mirrors `worker/usage.py`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import lcm
from typing import NamedTuple

from prism.messages import WAITS
from prism.sim.jobs import Job
from prism.sim.ticks import PER_SECOND, to_seconds, to_ticks

PARTS = lcm(*range(1, 9))
"""Of a tick: steps that run side by side, on eight lanes at most, share the device's time evenly."""
WAIT_TICKS = tuple(map(to_ticks, WAITS))


class Series(NamedTuple):
    """Ticks that grow evenly: `first`, `first + growth`, and so on, `num` of them."""

    first: int
    growth: int
    num: int

    def below(self, limit: int) -> int:
        """How many of them are less."""
        if self.first >= limit or not self.num:
            return 0
        return min(self.num, -(-(limit - self.first) // self.growth)) if self.growth else self.num

    def sum(self, start: int = 0) -> int:
        """Of all behind the first `start`."""
        num = self.num - start
        return num * (self.first + start * self.growth) + self.growth * (num * (num - 1) // 2)

    def sum_beyond(self, limit: int) -> int:
        """Of what each is more than the limit."""
        below = self.below(limit)
        return self.sum(below) - (self.num - below) * limit

    def sum_of_products(self, other: Series, count: int) -> int:
        """Of the first `count` of each, one by one."""
        linear = self.first * other.growth + self.growth * other.first
        squares = (count - 1) * count * (2 * count - 1) // 6
        whole = count * self.first * other.first + linear * (count * (count - 1) // 2)
        return whole + self.growth * other.growth * squares


class Gaps(NamedTuple):
    """Ticks from the end of one step of a model to that of the next one."""

    first: int
    rest: Series

    @property
    def num(self) -> int:
        """Of the gaps."""
        return self.rest.num + 1

    def total(self, count: int) -> int:
        """Of the first `count`, one at least."""
        rest = count - 1
        return self.first + rest * self.rest.first + self.rest.growth * (rest * (rest - 1) // 2)

    def gain(self, count: int, tpot: int) -> int:
        """Ticks that streams gain on their objective in the first `count` steps."""
        return count * tpot - self.total(count)

    def peak(self, tpot: int) -> int:
        """Steps, one at least, up to which that does not fall; they get longer, so it falls from there on."""
        return 1 + self.rest.below(tpot + 1)


@dataclass(slots=True)
class Usage:
    """Counters of one model; they only grow, and do not depend on how often they are looked at."""

    tpot: int
    """Ticks: the objective of all its streams."""
    num_requests: int = 0
    """That started."""
    prompt_tokens: int = 0
    """Theirs."""
    decoded_tokens: int = 0
    num_late: int = 0
    """First tokens that came late, or never, of requests that were hopeful."""
    num_parts: int = 0
    """Of ticks, that its steps had of the device."""
    _needed: int = 0
    """In parts of ticks, times the objective."""
    _blocked: list[int] = field(default_factory=lambda: [0] * len(WAITS))

    def __post_init__(self) -> None:
        self.tpot = max(1, self.tpot)

    def starting(self, jobs: Iterable[Job]) -> None:
        """A step computes part of their prompts: they start, unless they have before."""
        for job in jobs:
            if not job.is_started:
                job.is_started = True
                self.num_requests += 1
                self.prompt_tokens += job.prompt

    def ran_prompts(self, ticks: int) -> None:
        """A step with prompts has taken so long: it has the device to itself, and is needed in full."""
        self.num_parts += ticks * PARTS
        self._needed += ticks * PARTS * self.tpot
        self._block(Series(ticks, 0, 1), ticks)

    def ran_decodes(self, steps: Series, gaps: Gaps | None, width: int) -> None:
        """Decode steps have run, with so many lanes side by side. Without gaps all of it is needed."""
        part, whole = PARTS // width, steps.sum()
        self.num_parts += part * whole
        self._needed += part * (self.tpot * whole if gaps is None else self._weighted(steps, gaps))
        self._block(steps, whole)

    def _weighted(self, steps: Series, gaps: Gaps) -> int:
        """The sum of the worker's `needed` over the steps, times the objective."""
        weighted = steps.first * min(gaps.first, self.tpot)
        if steps.num == 1:
            return weighted
        early = gaps.rest.below(self.tpot)
        rest = Series(steps.first + steps.growth, steps.growth, steps.num - 1)
        return weighted + rest.sum_of_products(gaps.rest, early) + self.tpot * rest.sum(early)

    def _block(self, steps: Series, whole: int) -> None:
        """`whole` is the sum of the steps."""
        last = steps.first + steps.growth * (steps.num - 1)
        for place, wait in enumerate(WAIT_TICKS):
            if last <= wait:
                break
            all_are = steps.first >= wait
            self._blocked[place] += whole - steps.num * wait if all_are else steps.sum_beyond(wait)

    @property
    def device_seconds(self) -> float:
        """The part of the device's time that its steps had."""
        return self.num_parts / (PARTS * PER_SECOND)

    @property
    def needed_seconds(self) -> float:
        """What of it the objectives asked for."""
        return self._needed / (PARTS * PER_SECOND * self.tpot)

    @property
    def blocked_seconds(self) -> list[float]:
        """See the worker's."""
        return [to_seconds(ticks) for ticks in self._blocked]
