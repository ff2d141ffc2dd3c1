"""Several searches at once, on as many processes as there are for them.

A search asks for numbers of devices one after the other (`plan.steps`). What is tried for a number
(placements that stay, the controller with and without known loads) are runs that have nothing to do with one
another, and so are searches. Results do not depend on which ends first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from prism.sim.plan import Planner, Trial, best_of
from prism.sim.processes import process_pool

K = TypeVar("K")
T = TypeVar("T")
Progress = Callable[[K, int, Trial], None]
"""Hears of the best that a search has found for a number of devices."""


class Search(NamedTuple, Generic[T]):
    """Who tries numbers of devices, and what asks for them."""

    planner: Planner
    steps: Generator[int, Trial, T]


def carry_out(searches: Mapping[K, Search[T]], num_processes: int, progress: Progress[K]) -> dict[K, T]:
    """The results of all, in the same order. If there are few requests, other processes do not pay."""
    if num_processes == 1 or all(search.planner.is_quick for search in searches.values()):
        return {key: _one_by_one(key, search, progress) for key, search in searches.items()}
    with process_pool(num_processes) as pool:
        return _AtOnce(searches, pool, progress).run()


def _one_by_one(key: K, search: Search[T], progress: Progress[K]) -> T:
    planner, steps = search
    try:
        devices = next(steps)
        while True:
            trial = planner.best(devices)
            progress(key, devices, trial)
            devices = steps.send(trial)
    except StopIteration as end:
        result: T = end.value
        return result


@dataclass(slots=True)
class _Round:
    """A number of devices that is being tried."""

    devices: int
    attempts: list[Future[Trial]]


class _AtOnce(Generic[K, T]):
    """Each search has one round at a time."""

    def __init__(self, searches: Mapping[K, Search[T]], pool: Executor, progress: Progress[K]) -> None:
        self._searches = searches
        self._pool = pool
        self._progress = progress
        self._rounds: dict[K, _Round] = {}
        self._running: dict[Future[Trial], K] = {}
        self._results: dict[K, T] = {}

    def run(self) -> dict[K, T]:
        for key, search in self._searches.items():
            self._begin(key, next(search.steps))
        while self._running:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for attempt in done:
                attempt.result()  # raises what it has come to
                key = self._running.pop(attempt)
                if not self._running.keys() & self._rounds[key].attempts:
                    self._go_on(key)
        return {key: self._results[key] for key in self._searches}

    def _begin(self, key: K, devices: int) -> None:
        attempts = [self._pool.submit(attempt) for attempt in self._searches[key].planner.attempts(devices)]
        self._rounds[key] = _Round(devices, attempts)
        self._running.update(dict.fromkeys(attempts, key))

    def _go_on(self, key: K) -> None:
        """Everything has been tried for a number of devices."""
        found = self._rounds.pop(key)
        trial = best_of(attempt.result() for attempt in found.attempts)
        self._progress(key, found.devices, trial)
        try:
            self._begin(key, self._searches[key].steps.send(trial))
        except StopIteration as end:
            self._results[key] = end.value
