"""All devices of a run. They have nothing to do with one another, so each runs through by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from prism.profile import Profile
from prism.sim.device import SimDevice
from prism.sim.jobs import End, Job
from prism.sim.modes import RULES, Limits, Mode
from prism.sim.placing import Demand, Placement, fixed_shares
from prism.sim.ticks import NEVER
from prism.sim.workload import Workload, jobs_of
from prism.types import ModelId


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


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """What became of a device's requests."""

    jobs: tuple[Job, ...]
    counts: dict[ModelId, ModelCounts]
    end: int
    """When the last one ended."""
    busy: int
    """Ticks in which its lanes worked, added up."""
    num_events: int
    num_decisions: int


def run_device(
    models: Sequence[ModelId],
    jobs: Sequence[Job],
    load: Workload,
    setup: Setup,
    demand: Mapping[ModelId, Demand],
) -> DeviceResult:
    """Run a device with these models through all their requests."""
    rules, limits = RULES[setup.mode], setup.limits
    shares = None
    if rules.has_shares:
        shares = fixed_shares(models, load.served, demand, setup.num_slabs, limits.slab_bytes)
    served = [load.served[model] for model in models]
    device = SimDevice(served, setup.num_slabs, rules, limits, setup.profile.together, shares)
    for job in jobs:
        device.offer(job)
    device.run_until(NEVER)
    device.check()
    counts = {
        m.name: ModelCounts(m.num_activations, m.num_evictions, m.num_preemptions)
        for m in device.models.values()
    }
    stepper = device.stepper
    return DeviceResult(
        tuple(jobs), counts, device.now, stepper.busy, device.num_events, stepper.num_decisions
    )


def run_cluster(
    load: Workload,
    placement: Placement,
    setup: Setup,
    demand: Mapping[ModelId, Demand],
    progress: Callable[[int], None] = lambda _: None,
) -> list[DeviceResult]:
    """Run all devices; `progress` hears how many requests have been dealt with."""
    homes = placement.home()
    jobs: list[list[Job]] = [[] for _ in placement.devices]
    lost: list[Job] = []
    for job in jobs_of(load):
        home = homes.get(job.model)
        if home is None:
            job.finish(End.NO_PLACE, job.arrival)
            lost.append(job)
        else:
            jobs[home].append(job)
    results = [DeviceResult(tuple(lost), {}, 0, 0, 0, 0)] if lost else []
    for models, own in zip(placement.devices, jobs, strict=True):
        results.append(run_device(models, own, load, setup, demand))
        progress(len(own))
    return results
