"""All devices of a run. They have nothing to do with one another, so each runs through by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

from prism.modes import RULES, Mode
from prism.profile import Profile
from prism.sim.device import SimDevice
from prism.sim.jobs import End, Job
from prism.sim.modes import Limits
from prism.sim.placing import Demand, Placement, fixed_shares
from prism.sim.ticks import NEVER, to_seconds
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

    @property
    def num_slabs(self) -> int:
        """Of a device."""
        return self.memory_bytes // self.limits.slab_bytes


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What happened to a model."""

    activations: int
    evictions: int
    preemptions: int


class Outcome(NamedTuple):
    """What became of a request. Times are seconds."""

    model: ModelId
    end: End
    ttft: float | None
    tpot: float | None
    """Mean time between two tokens; None for what has one token or none."""
    ended: float
    is_clipped: bool


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """What became of a device's requests."""

    outcomes: tuple[Outcome, ...]
    counts: dict[ModelId, ModelCounts]
    busy: float
    """Seconds in which its lanes worked, added up."""
    num_events: int
    num_decisions: int


class Cluster:
    """Equal devices, and what they are to serve."""

    def __init__(self, load: Workload, setup: Setup, demand: Mapping[ModelId, Demand]) -> None:
        self.load = load
        self.setup = setup
        self.demand = demand

    def run(
        self,
        placement: Placement,
        processes: int = 1,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[DeviceResult]:
        """Run all devices; `progress` hears how many requests have been dealt with.

        What has no place comes first, as the result of a device that has no models.
        """
        homes = set(placement.home())
        lost = [job for job in jobs_of(self.load) if job.model not in homes]
        for job in lost:
            job.finish(End.NO_PLACE, job.arrival)
        results = [DeviceResult(tuple(map(_outcome, lost)), {}, 0.0, 0, 0)] if lost else []
        progress(len(lost))
        for result in self._each(placement.devices, processes):
            results.append(result)
            progress(len(result.outcomes))
        return results

    def _each(self, devices: Sequence[tuple[ModelId, ...]], processes: int) -> Iterator[DeviceResult]:
        if processes == 1 or len(devices) == 1 or len(self.load.requests) < FEW:
            yield from map(self.run_device, devices)
            return
        # spawn: whoever shows a progress bar has threads, which a fork would not survive
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            longest = sorted(devices, key=lambda models: -sum(self.demand[m].seconds for m in models))
            futures = {models: pool.submit(self.run_device, models) for models in longest}
            for models in devices:
                yield futures[models].result()

    def run_device(self, models: tuple[ModelId, ...]) -> DeviceResult:
        """Run a device with these models through all their requests."""
        setup, rules, limits = self.setup, RULES[self.setup.mode], self.setup.limits
        served = {model: self.load.served[model] for model in models}
        shares = None
        if rules.has_shares:
            shares = fixed_shares(models, served, self.demand, setup.num_slabs, limits.slab_bytes)
        together = setup.profile.together
        device = SimDevice(list(served.values()), setup.num_slabs, rules, limits, together, shares)
        jobs = [job for job in jobs_of(self.load) if job.model in served]
        for job in jobs:
            device.offer(job)
        device.run_until(NEVER)
        device.check()
        counts = {
            m.name: ModelCounts(m.num_activations, m.num_evictions, m.num_preemptions)
            for m in device.models.values()
        }
        stepper = device.stepper
        outcomes = tuple(map(_outcome, jobs))
        return DeviceResult(
            outcomes, counts, to_seconds(stepper.busy), device.num_events, stepper.num_decisions
        )


def _outcome(job: Job) -> Outcome:
    assert job.end is not None, f"{job.request_id} has not ended"
    first, tpot = job.first_token, None
    if first is not None and job.output > 1:
        tpot = to_seconds(job.last_token - first) / (job.output - 1)
    ttft = None if first is None else to_seconds(first - job.arrival)
    return Outcome(job.model, job.end, ttft, tpot, to_seconds(job.end_time), job.is_clipped)
