"""How hard devices are pressed by the models that live on them, as arrays over all devices. Pure.

The pressure of a device is its tighter resource, and a tenth of the other, which decides between equals:

    kv       = KV_HELD * KV_TPOT * sum(token_rate * kv_bytes_per_token / tpot) / (memory - weights)
    compute  = sum(compute) / speed
    late     = LATE * sum over two models of it: asked(one) * blocked(other, ttft of one)
    pressure = max(kv, compute) + 0.1 * min(kv, compute) + late

The sum in `kv` is the published KV pressure ratio. Its factor makes it comparable with a share of time: at an
objective of `KV_TPOT`, with tokens that are held for `KV_HELD`, 1 means that what runs fills the memory.

`late` are the requests whose first token is late for a neighbour's step alone: `blocked` is the share of the
time in which a request that comes has to wait longer than its objective for the end of such a step, and
`asked` a model's requests, where the mean of all devices is 1. `compute` is what objectives ask for, so it
says how much more fits; `late` goes by how long steps really were.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism.controller.snapshot import DeviceState, ModelNeed
from prism.messages import WAITS

KV_HELD = 10.0
KV_TPOT = 0.1
LEAST_TPOT = 1e-3
"""An objective of 0 is none that counts."""
SECOND = 0.1
"""Weight of the resource that is not the tighter one."""

LATE = 1.0
"""What it is worth that no request is late for a neighbour's step, in devices."""

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Entry:
    """What one home of a model brings to its device: the whole of it, or a share of its load."""

    weights: float
    floor: float
    kv: float
    compute: float
    noise: float
    is_live: bool
    is_pinned: bool
    asked: Floats
    """Its requests a second by the longest wait that they can bear, in steps of `WAITS`."""
    blocked: Floats
    """Shares of the time in which others have to wait longer than each of `WAITS` for it."""


_NOTHING = np.zeros(len(WAITS))


def _by_wait(rate: float, wait: float) -> Floats:
    """Split among the two of `WAITS` around it, so that what is between two of them is read off a line."""
    asked = np.zeros(len(WAITS))
    place = bisect_left(WAITS, wait)
    if place in (0, len(WAITS)):
        asked[min(place, len(WAITS) - 1)] = rate
        return asked
    low, high = WAITS[place - 1 : place + 1]
    asked[place] = rate * (wait - low) / (high - low)
    asked[place - 1] = rate - asked[place]
    return asked


def entry_of(model: ModelNeed, num_homes: int) -> Entry:
    """The load is shared among replicas and parts; weights and floor are so among parts only."""
    kv = KV_HELD * KV_TPOT * model.token_rate * model.kv_bytes_per_token / max(model.tpot, LEAST_TPOT)
    count = max(1, num_homes, model.tp)
    return Entry(
        model.weights_bytes / model.tp,
        model.kv_floor_bytes / model.tp,
        kv / count,
        model.compute / count,
        model.noise,
        model.is_live,
        model.is_pinned,
        _by_wait(model.request_rate / count, model.ttft) if model.request_rate else _NOTHING,
        np.array(model.blocked) / count if model.blocked else _NOTHING,
    )


def pressure_of(kv: Any, compute: Any) -> Any:
    """See the module's docstring; numbers or arrays."""
    return np.maximum(kv, compute) + SECOND * np.minimum(kv, compute)


class Fleet:
    """Sums for each device of what lives there, kept while models come and go."""

    def __init__(self, devices: Sequence[DeviceState], request_rate: float = 0.0) -> None:
        """`request_rate` is that of all models together."""
        self.workers = tuple(device.worker for device in devices)
        self.index = {worker: place for place, worker in enumerate(self.workers)}
        self._slab: Floats = np.array([float(device.slab_bytes) for device in devices])
        self._slabs: Floats = np.array([float(d.memory_bytes // d.slab_bytes) for d in devices])
        self.capacity: Floats = self._slab * self._slabs
        self.speed: Floats = np.array([device.speed for device in devices])
        self._means = tuple(float(each.mean()) for each in (self.capacity, self._slab, self.speed))
        self.is_up: Mask = np.array([device.is_up for device in devices], dtype=bool)
        self._used: Floats = np.zeros(len(devices))
        self._pinned: Floats = np.zeros(len(devices))
        """Of the slabs that are used, those that nobody can have."""
        self._weights: Floats = np.zeros(len(devices))
        self._kv: Floats = np.zeros(len(devices))
        self._compute: Floats = np.zeros(len(devices))
        self._kv_variance: Floats = np.zeros(len(devices))
        self._compute_variance: Floats = np.zeros(len(devices))
        self._asked: Floats = np.zeros((len(devices), len(WAITS)))
        self._blocked: Floats = np.zeros((len(devices), len(WAITS)))
        self._late: Floats = np.zeros(len(devices))
        """Requests a second that are late for a neighbour's step."""
        self._asked_variance: Floats = np.zeros((len(devices), len(WAITS)))
        self._blocked_variance: Floats = np.zeros((len(devices), len(WAITS)))
        self._per_request = LATE * len(devices) / request_rate if request_rate else 0.0
        self._pressures: Floats | None = None
        self._idle: Floats = np.zeros(len(devices))

    # --- who lives where ------------------------------------------------------------------------------

    def add(self, entry: Entry, place: int, sign: int = 1) -> None:
        """A model comes to live on a device; what is idle reserves nothing."""
        if not entry.is_live:
            self._idle[place] += sign * entry.weights
            return
        self._pressures = None
        self._used[place] += sign * self.need(entry, place)
        self._pinned[place] += sign * self._kept(entry, place)
        self._weights[place] += sign * entry.weights
        self._kv[place] += sign * entry.kv
        self._compute[place] += sign * entry.compute
        self._kv_variance[place] += sign * (entry.kv * entry.noise) ** 2
        self._compute_variance[place] += sign * (entry.compute * entry.noise) ** 2
        self._late[place] += sign * self._late_with(entry, place, is_there=sign < 0)
        self._asked[place] += sign * entry.asked
        self._blocked[place] += sign * entry.blocked
        self._asked_variance[place] += sign * (entry.asked * entry.noise) ** 2
        self._blocked_variance[place] += sign * (entry.blocked * entry.noise) ** 2

    def _late_with(self, entry: Entry, place: int, *, is_there: bool) -> float:
        """Requests that are late because a model is beside the others of its device, its own and theirs."""
        late = float(self._blocked[place] @ entry.asked + self._asked[place] @ entry.blocked)
        return late - 2 * float(entry.asked @ entry.blocked) if is_there else late

    def late_share(self, entry: Entry, place: int) -> float:
        """Of a model's requests on its device, those that are late for a neighbour's step alone."""
        late = float((self._blocked[place] - entry.blocked) @ entry.asked)
        return late / float(entry.asked.sum()) if late > 0 else 0.0

    def remove(self, entry: Entry, place: int) -> None:
        """It leaves."""
        self.add(entry, place, -1)

    def need(self, entry: Entry, place: int) -> float:
        """Slabs that it takes at least on a device: weights, and a floor of KV, one slab or more."""
        slab = float(self._slab[place])
        return math.ceil(entry.weights / slab) + max(1, math.ceil(entry.floor / slab))

    def _need(self, entry: Entry) -> Floats:
        """The same on all devices."""
        floor = np.maximum(1.0, np.ceil(entry.floor / self._slab))
        return np.asarray(np.ceil(entry.weights / self._slab) + floor)

    def _kept(self, entry: Entry, place: int) -> float:
        """Slabs that nobody can have; a pinned model that the device cannot hold never comes."""
        if not entry.is_pinned or not self.holds(entry, place):
            return 0.0
        return self.need(entry, place) - (entry.floor == 0)  # its KV may all be had then

    # --- what follows ---------------------------------------------------------------------------------

    def holds(self, entry: Entry, place: int) -> bool:
        """A device can hold it, with nothing beside it."""
        return self.need(entry, place) <= float(self._slabs[place])

    def fits_alone(self, entry: Entry) -> Mask:
        """Devices that can hold it at all."""
        return np.asarray(self._need(entry) <= self._slabs)

    def fits_beside_pinned(self, entry: Entry) -> Mask:
        """Devices that can hold it if all that is not pinned gives way; it lives on none of them."""
        return np.asarray(self._pinned + self._need(entry) <= self._slabs)

    def is_shut_out(self, entry: Entry, place: int) -> bool:
        """Pinned models leave it no room on a device on which it lives, and which could hold it else."""
        need, slabs = self.need(entry, place), float(self._slabs[place])
        return need <= slabs < float(self._pinned[place]) - self._kept(entry, place) + need

    def fits(self, entry: Entry) -> Mask:
        """Devices that have room for it beside what lives there."""
        return np.asarray(self._used + self._need(entry) <= self._slabs)

    def excess(self) -> Floats:
        """Slabs by which what is live on a device is too much, where it is."""
        return self._used - self._slabs

    def pressures(self) -> Floats:
        """Of all devices as they are."""
        if self._pressures is None:
            self._pressures = np.asarray(pressure_of(*self.parts()) + self._late * self._per_request)
        return self._pressures

    def parts(self) -> tuple[Floats, Floats]:
        """KV and compute of all devices as they are."""
        return self._kv / self._shared(0.0), self._compute / self.speed

    def noise(self, place: int, other: int) -> float:
        """Standard deviation of the difference between two devices' pressures, as far as it was measured."""
        both = [place, other]
        kv = self._kv_variance[both] / self._shared(0.0)[both] ** 2
        compute = self._compute_variance[both] / self.speed[both] ** 2
        late = sum(self._late_noise(each) ** 2 for each in both)
        return math.sqrt(max(0.0, float(np.maximum(kv, compute).sum())) + late)

    def _late_noise(self, place: int) -> float:
        """Of the part of the pressure that is late requests. What a model asks of itself is in the sums, but
        counts in proportion only."""
        asked, blocked = self._asked[place], self._blocked[place]
        if (both := float(asked @ blocked)) <= 0 or self._late[place] <= 0:
            return 0.0
        of_asked = float(np.maximum(0.0, self._asked_variance[place]) @ blocked**2)
        of_blocked = float(np.sqrt(np.maximum(0.0, self._blocked_variance[place])) @ asked)
        share = float(self._late[place]) / both
        return math.hypot(math.sqrt(of_asked), of_blocked) * share * self._per_request

    def with_added(self, entry: Entry) -> Floats:
        """Pressure that each device would have with the entry on it."""
        kv = (self._kv + entry.kv) / self._shared(entry.weights)
        late = self._late + self._blocked @ entry.asked + self._asked @ entry.blocked
        pressure = pressure_of(kv, self.busy_with(entry))
        return np.asarray(pressure + late * self._per_request)

    def busy_with(self, entry: Entry) -> Floats:
        """Share of its time that each device would be asked for with the entry on it."""
        return np.asarray((self._compute + entry.compute) / self.speed)

    def with_removed(self, entry: Entry, place: int) -> float:
        """Pressure that its device would have without it."""
        shared = max(self._slab[place], self.capacity[place] - self._weights[place] + entry.weights)
        compute = (self._compute[place] - entry.compute) / self.speed[place]
        late = float(self._late[place]) - self._late_with(entry, place, is_there=True)
        return float(pressure_of((self._kv[place] - entry.kv) / shared, compute) + late * self._per_request)

    def _shared(self, added: float) -> Floats:
        """Memory for KV; where weights leave none it is one slab, which makes the pressure very high."""
        return np.maximum(self._slab, self.capacity - self._weights - added)

    def homeliness(self, entry: Entry) -> Floats:
        """For idle models, less is better: pressure, and how much of a device all weights would fill."""
        return np.asarray(self.pressures() + (self._idle + self._weights + entry.weights) / self.capacity)

    def demand(self, entry: Entry) -> float:
        """The pressure of a model by itself, on a device that is like the mean of all."""
        memory, slab, speed = self._means
        kv, compute = entry.kv / max(memory - entry.weights, slab), entry.compute / speed
        return max(kv, compute) + SECOND * min(kv, compute)


def lowest(values: Floats, mask: Mask) -> int:
    """The first of the places with the lowest value, where the mask allows it."""
    return int(np.argmin(np.where(mask, values, np.inf)))
