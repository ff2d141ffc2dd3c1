"""What has become of requests, devices and models, as values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from prism.sim.device import SimDevice
from prism.sim.jobs import End, Job
from prism.sim.ticks import to_seconds
from prism.types import ModelId


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What happened to a model on a device."""

    activations: int
    ahead: int
    """Of the activations, those before anybody asked."""
    evictions: int
    preemptions: int


class Outcome(NamedTuple):
    """What became of a request. Times are seconds."""

    model: ModelId
    arrival: float
    end: End
    ttft: float | None
    tpot: float | None
    """Mean time between two tokens; None for what has one token or none."""
    ended: float
    is_clipped: bool


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """What became of the requests that ended on a device."""

    outcomes: tuple[Outcome, ...]
    counts: dict[ModelId, ModelCounts]
    busy: float
    """Seconds in which its lanes worked, added up."""
    num_events: int
    num_decisions: int


def result_of(device: SimDevice, jobs: Iterable[Job]) -> DeviceResult:
    """Of a device that has done its work."""
    device.check()
    counts = {
        m.name: ModelCounts(m.num_activations, m.num_ahead, m.num_evictions, m.num_preemptions)
        for m in device.models.values()
    }
    stepper = device.stepper
    decisions = stepper.lanes.num_decisions
    return DeviceResult(
        tuple(map(_outcome, jobs)), counts, to_seconds(stepper.busy), device.num_events, decisions
    )


def without_place(jobs: Iterable[Job]) -> DeviceResult:
    """Of requests whose models fit nowhere, as if of a device that has no models."""
    outcomes = []
    for job in jobs:
        job.finish(End.NO_PLACE, job.arrival)
        outcomes.append(_outcome(job))
    return DeviceResult(tuple(outcomes), {}, 0.0, 0, 0)


def _outcome(job: Job) -> Outcome:
    assert job.end is not None, f"{job.request_id} has not ended"
    first, tpot = job.first_token, None
    if first is not None and job.output > 1:
        tpot = to_seconds(job.last_token - first) / (job.output - 1)
    ttft = None if first is None else to_seconds(first - job.arrival)
    times = to_seconds(job.arrival), to_seconds(job.end_time)
    return Outcome(job.model, times[0], job.end, ttft, tpot, times[1], job.is_clipped)
