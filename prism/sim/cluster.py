"""All devices of a run.

On a fixed placement they have nothing to do with one another, so each runs through by itself. Under the
controller they go together from one of its looks to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prism.config import SchedulingConfig
from prism.modes import RULES, Mode
from prism.profile import Profile
from prism.sim.controlling import Controlled, Done
from prism.sim.device import SimDevice
from prism.sim.jobs import Job
from prism.sim.modes import Limits
from prism.sim.placing import Demand, Placement, Room, fixed_shares
from prism.sim.processes import process_pool
from prism.sim.results import DeviceResult, result_of, without_place
from prism.sim.ticks import NEVER
from prism.sim.workload import Workload, jobs_of
from prism.types import ModelId

FEW = 2000
"""Requests that are dealt with before other processes have started."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Equal devices, and how they are shared."""

    mode: Mode
    profile: Profile
    memory_bytes: int
    """Of a device, for weights and KV."""
    limits: Limits
    scheduling: SchedulingConfig = field(default_factory=SchedulingConfig)
    """Of the controller."""
    order: tuple[ModelId, ...] = ()
    """Of a configuration's models: those that keep their weights are bound to lanes in this order."""

    @property
    def num_slabs(self) -> int:
        """Of a device."""
        return self.memory_bytes // self.limits.slab_bytes


class Controlling(NamedTuple):
    """A run under the controller."""

    results: list[DeviceResult]
    placement: Placement
    """Where models lived in the end."""
    done: tuple[Done, ...]


class Cluster:
    """Equal devices, and what they are to serve."""

    def __init__(self, load: Workload, setup: Setup, demand: Mapping[ModelId, Demand]) -> None:
        self.load = load
        self.setup = setup
        self.demand = demand

    @property
    def room(self) -> Room:
        """What one device holds."""
        setup = self.setup
        return Room(self.load.served, setup.num_slabs, setup.limits.slab_bytes, setup.mode)

    @property
    def is_quick(self) -> bool:
        """It has too few requests to start processes for them."""
        return len(self.load.requests) < FEW

    def run(
        self,
        placement: Placement,
        processes: int = 1,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[DeviceResult]:
        """Run all devices; `progress` hears how many requests have been dealt with.

        What has no place comes first, as the result of a device that has no models.
        """
        results, _ = self._without_place(placement.home(), progress)
        for result in self._each(placement.devices, processes):
            results.append(result)
            progress(len(result.outcomes))
        return results

    def run_controlled(
        self,
        num_devices: int,
        is_expected: bool = False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Controlling:
        """Run all devices under the controller, which knows loads from the start or has to measure them."""
        room = self.room
        able = {model: served for model, served in self.load.served.items() if room.holds([model])}
        results, jobs = self._without_place(able, progress)
        devices = [self._device(()) for _ in range(num_devices)]
        controlled = Controlled(able, devices, self.setup.scheduling, self.demand if is_expected else None)
        controlled.run(jobs, progress)
        results += [result_of(*each) for each in controlled.ended()]
        unplaced = tuple(sorted(set(self.load.served) - set(able)))
        return Controlling(results, Placement(controlled.homes(), unplaced), tuple(controlled.done))

    def _without_place(
        self, placed: Mapping[ModelId, object], progress: Callable[[int], None]
    ) -> tuple[list[DeviceResult], list[Job]]:
        """What comes of requests without a place, and all others."""
        jobs = jobs_of(self.load)
        lost = [job for job in jobs if job.model not in placed]
        progress(len(lost))
        return [without_place(lost)] if lost else [], [job for job in jobs if job.model in placed]

    def _each(self, devices: Sequence[tuple[ModelId, ...]], processes: int) -> Iterator[DeviceResult]:
        if processes == 1 or len(devices) == 1 or self.is_quick:
            yield from map(self.run_device, devices)
            return
        with process_pool(processes) as pool:
            longest = sorted(devices, key=lambda models: -sum(self.demand[m] for m in models))
            futures = {models: pool.submit(self.run_device, models) for models in longest}
            for models in devices:
                yield futures[models].result()

    def run_device(self, models: tuple[ModelId, ...]) -> DeviceResult:
        """Run a device with these models through all their requests."""
        device = self._device(models)
        jobs = [job for job in jobs_of(self.load) if job.model in device.models]
        for job in jobs:
            device.offer(job)
        device.run_until(NEVER)
        return result_of(device, jobs)

    def _device(self, models: Sequence[ModelId]) -> SimDevice:
        setup, rules, limits = self.setup, RULES[self.setup.mode], self.setup.limits
        places = {model: place for place, model in enumerate(setup.order)}
        models = sorted(models, key=lambda model: places.get(model, len(places)))
        served = {model: self.load.served[model] for model in models}
        shares = None
        if rules.has_shares:
            shares = fixed_shares(models, served, self.demand, setup.num_slabs, limits.slab_bytes)
        return SimDevice(
            list(served.values()), setup.num_slabs, rules, limits, setup.profile.together, shares
        )
