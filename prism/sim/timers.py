"""When requests come to a device, when those that wait are refused, and when the longest life has passed."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Container
from heapq import heappop, heappush

from prism.sim.jobs import Job
from prism.sim.modes import Limits
from prism.sim.ticks import NEVER, to_ticks
from prism.types import RequestId


class Timers:
    """Of one device. A request that has gone elsewhere, or has ended, is skipped when its time comes."""

    def __init__(self, limits: Limits, waiting: Container[Job]) -> None:
        """`waiting` are the device's requests that have not been admitted."""
        self._waiting = waiting
        self._max_wait = to_ticks(limits.max_wait)
        self._life = to_ticks(limits.request_timeout)
        self._arrivals: deque[Job] = deque()
        self._expiries: list[tuple[int, RequestId, Job]] = []
        self._lives: deque[Job] = deque()
        """All that have come, in order of arrival."""
        self._bound = NEVER
        """Nothing comes before."""

    def offer(self, job: Job) -> None:
        """A request that will come; in order of arrival."""
        self._arrivals.append(job)
        self._bound = min(self._bound, job.arrival)

    def came(self, job: Job) -> None:
        """It is here: its life counts from its arrival, wherever that was."""
        if self._lives and self._lives[-1].rank > job.rank:
            insort(self._lives, job, key=lambda each: each.rank)
        else:
            self._lives.append(job)
        self._bound = min(self._bound, job.arrival + self._life)

    def waits(self, job: Job) -> None:
        """It may wait for so long, unless it has started before."""
        if not job.is_started:
            heappush(self._expiries, (job.arrival + self._max_wait, job.request_id, job))
            self._bound = min(self._bound, job.arrival + self._max_wait)

    def next(self, before: int = NEVER) -> int:
        """The first time of all, if there is one before that."""
        if self._bound >= before:
            return before
        self._bound = first = self._first()
        return first if first < before else before

    def _first(self) -> int:
        time = self._arrivals[0].arrival if self._arrivals else NEVER
        expiries, lives = self._expiries, self._lives
        while expiries and (expiries[0][2].is_started or expiries[0][2] not in self._waiting):
            heappop(expiries)
        if expiries and expiries[0][0] < time:
            time = expiries[0][0]
        while lives and lives[0].end is not None:
            lives.popleft()
        if lives and lives[0].arrival + self._life < time:
            time = lives[0].arrival + self._life
        return time

    def arrived(self, now: int) -> Job | None:
        """Take out a request that has come by now."""
        if self._arrivals and self._arrivals[0].arrival <= now:
            return self._arrivals.popleft()
        return None

    def outlived(self, now: int) -> Job | None:
        """Take out a request that has come, here or elsewhere, too long ago."""
        if self._lives and self._lives[0].arrival + self._life <= now:
            return self._lives.popleft()
        return None

    def has_expired(self, now: int) -> bool:
        """Somebody has waited for too long."""
        return bool(self._expiries) and self._expiries[0][0] <= now
