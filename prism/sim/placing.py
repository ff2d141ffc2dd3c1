"""Which models a device has.

`by_load` is the simulator's own: the baselines' placements come from it and from `plan`'s search.
`by_controller` asks the policy that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism.controller.placement import first_homes
from prism.controller.snapshot import DeviceState, ModelNeed
from prism.modes import RULES, Mode, kv_shares, least_kv
from prism.sim.jobs import Served
from prism.sim.trace import TraceRow
from prism.types import ModelId, WorkerId


@dataclass(frozen=True, slots=True)
class Placement:
    """The models of each device, and those that have no place."""

    devices: tuple[tuple[ModelId, ...], ...]
    unplaced: tuple[ModelId, ...] = ()

    def home(self) -> dict[ModelId, int]:
        """The device of each model that has one."""
        return {model: index for index, models in enumerate(self.devices) for model in models}


Demand = float
"""Seconds of a device that a model needs for each second of the trace: prompts, and decodes in batches."""
BATCH = 8


def demands(rows: Sequence[TraceRow], served: Mapping[ModelId, Served]) -> dict[ModelId, Demand]:
    """Of each model, over the trace's whole length."""
    span = max(1.0, rows[-1].arrival - rows[0].arrival)
    seconds = dict.fromkeys(served, 0.0)
    for row in rows:
        steps, middle = served[row.model].costs.steps, row.prompt + row.output / 2
        decode = row.output * steps.decode(BATCH, BATCH * middle)
        seconds[row.model] += steps.prefill(row.prompt) + decode / BATCH
    return {model: seconds[model] / span for model in served}


class Room:
    """What one kind of device holds."""

    def __init__(self, served: Mapping[ModelId, Served], num_slabs: int, slab_bytes: int, mode: Mode) -> None:
        self._slabs = {m: s.weight_slabs(slab_bytes) for m, s in served.items()}
        self._num_slabs = num_slabs
        self._least = least_kv(num_slabs, slab_bytes)
        self._is_resident = RULES[mode].is_resident

    def holds(self, models: Sequence[ModelId]) -> bool:
        """All of them fit, at a time if they keep their weights, else one by one."""
        needs = [self._slabs[model] + self._least for model in models]
        return (sum(needs) if self._is_resident else max(needs, default=0)) <= self._num_slabs


def by_load(demand: Mapping[ModelId, Demand], num_devices: int, room: Room) -> Placement:
    """Models by descending load, each to the device of least load that can hold it."""
    devices: list[list[ModelId]] = [[] for _ in range(num_devices)]
    load = [0.0] * num_devices
    unplaced = []
    for model in sorted(demand, key=lambda m: (-demand[m], m)):
        able = [i for i in range(num_devices) if room.holds([*devices[i], model])]
        if not able:
            unplaced.append(model)
            continue
        best = min(able, key=lambda i: (load[i], i))
        devices[best].append(model)
        load[best] += demand[model]
    return Placement(tuple(tuple(models) for models in devices), tuple(sorted(unplaced)))


def needs_of(
    served: Mapping[ModelId, Served], demand: Mapping[ModelId, Demand] | None = None
) -> tuple[ModelNeed, ...]:
    """What placement knows of the models when it starts, with the loads that are expected or without."""
    return tuple(
        ModelNeed(
            model,
            one.costs.shape.weight_bytes,
            one.costs.shape.kv_bytes_per_token,
            tpot=one.slo.tpot,
            ttft=one.slo.ttft,
            compute=demand[model] if demand else 0.0,
        )
        for model, one in sorted(served.items())
    )


def by_controller(
    served: Mapping[ModelId, Served],
    demand: Mapping[ModelId, Demand],
    num_devices: int,
    room: Room,
    memory_bytes: int,
    slab_bytes: int,
) -> Placement:
    """Homes as the controller gives them when it starts, with each model's expected load."""
    workers = [WorkerId(f"worker-{index}") for index in range(num_devices)]
    devices = tuple(DeviceState(worker, memory_bytes, slab_bytes) for worker in workers)
    homes = first_homes(needs_of(served, demand), devices)
    able = {model for model in homes if room.holds([model])}
    lists = tuple(tuple(m for m in sorted(able) if homes[m][0].worker == worker) for worker in workers)
    return Placement(lists, tuple(sorted(set(homes) - able)))


def fixed_shares(
    models: Sequence[ModelId],
    served: Mapping[ModelId, Served],
    demand: Mapping[ModelId, Demand],
    num_slabs: int,
    slab_bytes: int,
) -> dict[ModelId, int]:
    """Slabs of KV of each model of a device, as a worker divides them where loads are configured."""
    least = least_kv(num_slabs, slab_bytes)
    spare = num_slabs - sum(served[m].weight_slabs(slab_bytes) for m in models)
    loads = [demand[m] for m in models]
    return dict(zip(models, kv_shares(spare, [least] * len(models), loads), strict=True))
