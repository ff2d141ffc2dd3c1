"""Which models a device has.

`by_load` is the simulator's own: the baselines' placements come from it and from `plan`'s search.
`by_controller` asks the policy that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prism.controller.placement import first_homes
from prism.controller.snapshot import DeviceState, ModelNeed
from prism.modes import RULES, Mode
from prism.sim.jobs import Served
from prism.sim.trace import TraceRow
from prism.types import MiB, ModelId, WorkerId

LEAST_KV = 512 * MiB
"""Of each model that keeps its weights on a device."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The models of each device, and those that have no place."""

    devices: tuple[tuple[ModelId, ...], ...]
    unplaced: tuple[ModelId, ...] = ()

    def home(self) -> dict[ModelId, int]:
        """The device of each model that has one."""
        return {model: index for index, models in enumerate(self.devices) for model in models}


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model's requests ask for."""

    seconds: float
    """Of a device, for each second of the trace: prompts, and decodes in batches of `BATCH`."""
    kv_bytes: float
    """Held on average."""


BATCH = 8


def demands(rows: Sequence[TraceRow], served: Mapping[ModelId, Served]) -> dict[ModelId, Demand]:
    """Of each model, over the trace's whole length."""
    span = max(1.0, rows[-1].arrival - rows[0].arrival)
    seconds = dict.fromkeys(served, 0.0)
    held = dict.fromkeys(served, 0.0)
    for row in rows:
        one = served[row.model]
        steps, middle = one.costs.steps, row.prompt + row.output / 2
        decode = row.output * steps.decode(BATCH, BATCH * middle)
        seconds[row.model] += steps.prefill(row.prompt) + decode / BATCH
        held[row.model] += middle * one.costs.shape.kv_bytes_per_token * decode
    return {model: Demand(seconds[model] / span, held[model] / span) for model in served}


class Room:
    """What one kind of device holds."""

    def __init__(self, served: Mapping[ModelId, Served], num_slabs: int, slab_bytes: int, mode: Mode) -> None:
        self._slabs = {m: -(-s.costs.shape.weight_bytes // slab_bytes) for m, s in served.items()}
        self._num_slabs = num_slabs
        self._least = max(1, LEAST_KV // slab_bytes)
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
    for model in sorted(demand, key=lambda m: (-demand[m].seconds, m)):
        able = [i for i in range(num_devices) if room.holds([*devices[i], model])]
        if not able:
            unplaced.append(model)
            continue
        best = min(able, key=lambda i: (load[i], i))
        devices[best].append(model)
        load[best] += demand[model].seconds
    return Placement(tuple(tuple(sorted(models)) for models in devices), tuple(sorted(unplaced)))


def by_controller(
    served: Mapping[ModelId, Served], num_devices: int, room: Room, memory_bytes: int, slab_bytes: int
) -> Placement:
    """Homes as the controller gives them when it starts."""
    workers = [WorkerId(f"worker-{index}") for index in range(num_devices)]
    needs = tuple(
        ModelNeed(m, s.costs.shape.weight_bytes, s.costs.shape.kv_bytes_per_token)
        for m, s in sorted(served.items())
    )
    homes = first_homes(needs, tuple(DeviceState(w, memory_bytes, slab_bytes) for w in workers))
    able = {model for model in homes if room.holds([model])}
    devices = tuple(tuple(m for m in sorted(able) if homes[m][0].worker == worker) for worker in workers)
    return Placement(devices, tuple(sorted(set(homes) - able)))


def fixed_shares(
    models: Sequence[ModelId],
    served: Mapping[ModelId, Served],
    demand: Mapping[ModelId, Demand],
    num_slabs: int,
    slab_bytes: int,
) -> dict[ModelId, int]:
    """Slabs of KV of each model of a device: the least, and of the rest in proportion to what it holds."""
    least = max(1, LEAST_KV // slab_bytes)
    rest = num_slabs - sum(-(-served[m].costs.shape.weight_bytes // slab_bytes) + least for m in models)
    total = sum(demand[m].kv_bytes for m in models)
    if not total:
        return {m: least + rest // len(models) for m in models}
    return {m: least + int(rest * demand[m].kv_bytes / total) for m in models}
