"""Devices under the controller that ships: it looks at intervals, moves models, and requests are routed.

All devices run until the next look, then they report, and what is decided is carried out before they go on:

    route what arrives until then -> devices -> reports -> placer, moves -> commands, routes

While something moves, and while a model has several homes, the devices concerned report twice a second,
as workers do; else everybody reports when placement looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from math import isfinite
from typing import NamedTuple

from prism.config import SchedulingConfig
from prism.controller import migration as steps
from prism.controller.migration import Migration
from prism.controller.moves import Moves
from prism.controller.placement import first_homes
from prism.controller.placer import Placer
from prism.controller.snapshot import DeviceState
from prism.controller.state import ControllerState
from prism.controller.views import Catalog
from prism.sim import commands
from prism.sim.device import SimDevice
from prism.sim.gateway import Gateway
from prism.sim.jobs import Job, Served
from prism.sim.placing import Demand, needs_of
from prism.sim.ticks import NEVER, PER_SECOND, first_at, to_seconds
from prism.types import ModelId, WorkerId

REPORT_TICKS = PER_SECOND // 2


class Kind(StrEnum):
    """What has been done to a model's homes while it was in memory."""

    MIGRATION = "migrations"
    REPLICA = "replicas"
    """One home more."""
    MERGE = "merges"
    """One less."""


class Done(NamedTuple):
    """A migration that has come to something."""

    at: float
    """Seconds, its end."""
    model: ModelId
    kind: Kind


def kind_of(migration: Migration) -> Kind:
    """By which of its ends it has."""
    if migration.source is None:
        return Kind.REPLICA
    return Kind.MERGE if migration.target is None else Kind.MIGRATION


def worker_of(index: int) -> WorkerId:
    """A device's name."""
    return WorkerId(f"worker-{index}")


class Controlled:
    """Devices, a controller and a gateway."""

    def __init__(
        self,
        served: Mapping[ModelId, Served],
        devices: Sequence[SimDevice],
        config: SchedulingConfig,
        expected: Mapping[ModelId, Demand] | None = None,
    ) -> None:
        """`expected` are loads that are known before anybody asks; first homes go by them."""
        self._served = served
        self._devices = {worker_of(index): device for index, device in enumerate(devices)}
        memory = ((device.memory.num_slabs * device.slab_bytes, device.slab_bytes) for device in devices)
        states = tuple(DeviceState(w, *m) for w, m in zip(self._devices, memory, strict=True))
        catalog = Catalog(needs_of(served, expected), states)
        self.state = ControllerState(1, first_homes(catalog.models, states))
        cooldown, drain = config.migration_cooldown, config.drain_timeout
        self._moves = Moves(self.state, self, cooldown=cooldown, drain_seconds=drain)
        up = frozenset(self._devices)
        self._placer = Placer(config, catalog, self.state, self._moves, lambda: up, 0.0)
        self._gateway = Gateway(up)
        self._where: dict[Job, WorkerId] = {}
        """The device that each request was last sent to."""
        self._now = 0
        self._heard: list[tuple[ModelId, steps.Event, int]] = []
        """What has come of commands; told when the present event has been dealt with."""
        self.done: list[Done] = []
        for worker, device in self._devices.items():
            self._placer.on_report(commands.first_report(device, worker, served), 0.0)
        self.routes_changed()

    def run(self, jobs: Sequence[Job], progress: Callable[[int], None] = lambda _: None) -> None:
        """All of them, in order of arrival, until each has ended; `progress` hears how many have come."""
        place = 0
        while place < len(jobs) or any(d.next_event() < NEVER for d in self._devices.values()):
            concerned = self._concerned()
            end, before = self._next_look(bool(concerned)), place
            while place < len(jobs) and jobs[place].arrival < end:
                job = jobs[place]
                self._send(job).offer(job)
                place += 1
            for device in self._devices.values():
                device.run_until(end)
            self._look(end, concerned)
            progress(place - before)

    def _send(self, job: Job) -> SimDevice:
        worker = self._where[job] = self._gateway.route(job)
        device = self._devices[worker]
        device.learn(self._served[job.model])
        return device

    def homes(self) -> tuple[tuple[ModelId, ...], ...]:
        """The models that live on each device."""
        lists: dict[WorkerId, list[ModelId]] = {worker: [] for worker in self._devices}
        for model, homes in sorted(self.state.homes.items()):
            for home in homes:
                lists[home.worker].append(model)
        return tuple(tuple(models) for models in lists.values())

    def ended(self) -> list[tuple[SimDevice, list[Job]]]:
        """The devices with the requests that ended there."""
        jobs: dict[WorkerId, list[Job]] = {worker: [] for worker in self._devices}
        for job, worker in self._where.items():
            jobs[worker].append(job)
        return [(self._devices[worker], each) for worker, each in jobs.items()]

    def _next_look(self, is_anybody_concerned: bool) -> int:
        due = first_at(self._placer.due) if isfinite(self._placer.due) else NEVER
        return min(due, self._now + REPORT_TICKS) if is_anybody_concerned else due

    def _concerned(self) -> list[WorkerId]:
        """Devices of models that move, or that have several homes."""
        state = self.state
        models = [*state.migrations, *(model for model, homes in state.homes.items() if len(homes) > 1)]
        return sorted({worker for model in models for worker in state.places(model)})

    def _look(self, now: int, concerned: Iterable[WorkerId]) -> None:
        """Reports, and what follows from them."""
        self._now, seconds = now, to_seconds(now)
        is_for_placement = seconds >= self._placer.due
        workers = self._devices if is_for_placement else concerned
        for worker in workers:
            device = self._devices[worker]
            report = commands.report_of(device, worker, now, is_for_placement=is_for_placement)
            self._gateway.on_report(report)
            self.state.on_report(report)
            if self._placer.on_report(report, seconds):
                self.routes_changed()
        if self._placer.tick(seconds).are_routes_changed:
            self.routes_changed()
        while self._heard:
            model, event, number = self._heard.pop(0)
            self._moves.on_event(model, event, seconds, number)

    # --- the hands of `Moves` ---------------------------------------------------------------------------

    def activate(self, model: ModelId, worker: WorkerId, number: int) -> None:
        """See `Hands`. That it is active is seen in a report."""
        commands.activate(self._devices[worker], self._served[model], self._now)

    def evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None:
        """See `Hands`. What comes back goes where the model lives now."""
        jobs = commands.evict(self._devices[worker], model, returns, self._now)
        self._heard.append((model, steps.EvictRefused() if jobs is None else steps.SourceCold(), number))
        for job in jobs or ():
            commands.take_over(self._send(job), job, self._now)

    def switched(self, model: ModelId) -> None:
        """See `Hands`."""

    def over(self, migration: Migration, failure: str | None) -> None:
        """See `Hands`."""
        if failure is None:
            self.done.append(Done(to_seconds(self._now), migration.model, kind_of(migration)))

    def routes_changed(self) -> None:
        """See `Hands`."""
        self.state.version += 1
        self._gateway.update(self.state.version, self.state.routes())
        for device, living in zip(self._devices.values(), self.homes(), strict=True):
            commands.settle(device, [self._served[model] for model in living], self._now)
