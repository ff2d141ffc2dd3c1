"""The fewest devices, and a placement, that reach a target attainment.

For a number of devices several placements are tried: by load, as the controller gives them, then the better
one changed step by step. A step moves a model from the device that misses most requests to the one that is
best off, or changes places with one there. Devices have nothing to do with one another, so a step runs
only the two that it changes; what a device does with a set of models is kept, in each process. Where the
mode has a controller that moves models, it is tried too, with the models' loads known from the start and
without: means of a whole trace may tell little of its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import or_
from typing import NamedTuple

from prism.modes import RULES, Mode
from prism.sim.cluster import Cluster
from prism.sim.placing import Placement, Room, by_controller, by_load
from prism.sim.report import is_tpot_met, is_ttft_met
from prism.sim.results import DeviceResult
from prism.types import ModelId

TRIES = 8
"""Changes that are tried for a number of devices."""
WITHIN = 0.1
"""Who misses a target by more is not improved: a model moved brings less."""


@dataclass(frozen=True, slots=True)
class Target:
    """Shares of requests that must meet their objectives."""

    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class Trial:
    """What a placement reaches."""

    placement: Placement
    """Where the models are; under the controller, where they are in the end."""
    ttft: float
    """Share of the requests whose first token is in time."""
    tpot: float
    """Of those whose other tokens are."""
    both: float
    is_controlled: bool = False
    """The controller moved the models meanwhile."""

    def meets(self, target: Target) -> bool:
        """Both objectives' shares."""
        return self.ttft >= target.ttft and self.tpot >= target.tpot

    def lacks(self, target: Target) -> float:
        """Share of requests by which the worse one misses."""
        return max(target.ttft - self.ttft, target.tpot - self.tpot)


@dataclass(frozen=True, slots=True)
class Plan:
    """The fewest devices with their placement, or the best that the most devices reach."""

    trials: dict[int, Trial]
    """The best placement of each number of devices that was tried."""
    num_devices: int | None
    """The fewest that meet the target."""

    @property
    def chosen(self) -> Trial:
        """With the fewest devices, or else with the most."""
        return self.trials[self.num_devices if self.num_devices is not None else max(self.trials)]


def steps(target: Target, most: int) -> Generator[int, Trial, Plan]:
    """Double the devices until they suffice, then halve the gap: more are taken to be no worse.

    Yields the number that is to be tried next, and is sent the best that is found for it.
    """
    trials: dict[int, Trial] = {}
    low, high = 0, 1
    trials[high] = yield high
    while not trials[high].meets(target):
        if high == most:
            return Plan(trials, None)
        low, high = high, min(most, 2 * high)
        trials[high] = yield high
    while high - low > 1:
        middle = (low + high) // 2
        trials[middle] = yield middle
        low, high = (low, middle) if trials[middle].meets(target) else (middle, high)
    return Plan(trials, high)


class Missed(NamedTuple):
    """Requests that miss objectives."""

    ttft: int
    tpot: int
    either: int


class Planner:
    """Tries numbers of devices in one mode."""

    def __init__(self, cluster: Cluster, target: Target) -> None:
        self._cluster = cluster
        self._target = target
        self._results: dict[tuple[ModelId, ...], DeviceResult] = {}
        setup = cluster.setup
        self._room = Room(cluster.load.served, setup.num_slabs, setup.limits.slab_bytes, setup.mode)

    @property
    def is_quick(self) -> bool:
        """It is done before other processes have started."""
        return self._cluster.is_quick

    def best(self, devices: int) -> Trial:
        """The best placement that is found, or the controller where that is better."""
        return best_of(attempt() for attempt in self.attempts(devices))

    def attempts(self, devices: int) -> list[Callable[[], Trial]]:
        """What is tried for a number of devices; each for itself, in other processes if need be."""
        fixed = partial(self._best_fixed, devices)
        if self._cluster.setup.mode is not Mode.PRISM or devices == 1:
            return [fixed]
        return [fixed, *(partial(self._controlled, devices, is_expected=known) for known in (True, False))]

    def _controlled(self, devices: int, *, is_expected: bool) -> Trial:
        run = self._cluster.run_controlled(devices, is_expected=is_expected)
        return Trial(run.placement, *self._met(self._misses(run.results)), is_controlled=True)

    def _best_fixed(self, devices: int) -> Trial:
        best = best_of(self._try(p) for p in self._starts(devices))
        changes, tries = self._changes(best.placement), 0
        while tries < TRIES and 0 < best.lacks(self._target) <= WITHIN:
            placement = next(changes, None)
            if placement is None:
                break
            tries += 1
            trial = self._try(placement)
            if _score(trial) > _score(best):
                best, changes = trial, self._changes(placement)
        return best

    def _starts(self, devices: int) -> Iterator[Placement]:
        cluster, setup = self._cluster, self._cluster.setup
        yield by_load(cluster.demand, devices, self._room)
        if not RULES[setup.mode].is_resident:
            served, slab = cluster.load.served, setup.limits.slab_bytes
            yield by_controller(served, cluster.demand, devices, self._room, setup.memory_bytes, slab)

    def _try(self, placement: Placement) -> Trial:
        return Trial(placement, *self._met(self._missed(placement.devices, placement.unplaced)))

    def _met(self, missed: Missed) -> tuple[float, float, float]:
        total = len(self._cluster.load.requests)
        return 1 - missed.ttft / total, 1 - missed.tpot / total, 1 - missed.either / total

    def _missed(self, devices: tuple[tuple[ModelId, ...], ...], unplaced: tuple[ModelId, ...] = ()) -> Missed:
        lost = sum(row.model in unplaced for row in self._cluster.load.requests) if unplaced else 0
        for models in devices:
            if models not in self._results:
                self._results[models] = self._cluster.run_device(models)
        return Missed(*(lost + n for n in self._misses([self._results[models] for models in devices])))

    def _misses(self, results: Iterable[DeviceResult]) -> Missed:
        served = self._cluster.load.served
        outcomes = [outcome for result in results for outcome in result.outcomes]
        first = [not is_ttft_met(outcome, served[outcome.model]) for outcome in outcomes]
        rest = [not is_tpot_met(outcome, served[outcome.model]) for outcome in outcomes]
        return Missed(sum(first), sum(rest), sum(map(or_, first, rest)))

    def _changes(self, placement: Placement) -> Iterator[Placement]:
        """Moves from the worst device to the best one, and exchanges between them, a few of each."""
        devices = placement.devices
        if len(devices) < 2:
            return
        order = sorted(range(len(devices)), key=lambda i: (sum(self._missed((devices[i],))[:2]), -i))
        best, worst = order[0], order[-1]
        load: Mapping[ModelId, float] = self._cluster.demand
        for model in sorted(devices[worst], key=lambda m: (-load[m], m))[:4]:
            yield from self._exchanged(placement, worst, best, model, None)
            for other in sorted(devices[best], key=lambda m: (load[m], m))[:2]:
                yield from self._exchanged(placement, worst, best, model, other)

    def _exchanged(
        self, placement: Placement, source: int, target: int, model: ModelId, other: ModelId | None
    ) -> Iterator[Placement]:
        back = () if other is None else (other,)
        devices = list(placement.devices)
        devices[source] = tuple(sorted((*(m for m in devices[source] if m != model), *back)))
        devices[target] = tuple(sorted((*(m for m in devices[target] if m != other), model)))
        if self._room.holds(devices[source]) and self._room.holds(devices[target]):
            yield Placement(tuple(devices), placement.unplaced)


def best_of(trials: Iterable[Trial]) -> Trial:
    """Of equals the first."""
    return max(trials, key=_score)


def _score(trial: Trial) -> float:
    return trial.ttft + trial.tpot
