"""What placement sees of the controller's state. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prism.controller.demand import DemandWindow
from prism.controller.snapshot import DeviceState, Home, ModelNeed, PlacementSnapshot, Policy
from prism.controller.state import ControllerState
from prism.messages import ModelReport
from prism.types import ModelId, ModelState, WorkerId

WARM = 3.0
"""Windows for which a model that is in memory counts as wanted after its last request.

One that is asked for once a minute would reserve memory in one look and none in the next, and its
neighbours would move to and fro: the weights of a large one decide how much its device has left.
"""
LINK_BYTES = 10e9
"""A second, for a model whose load has not been seen yet."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """What the configuration tells: models with what they take at least, and devices."""

    models: tuple[ModelNeed, ...]
    """Those that are loaded at start are wanted, as long as no worker has reported."""
    devices: tuple[DeviceState, ...]


def snapshot(
    catalog: Catalog,
    state: ControllerState,
    demand: DemandWindow,
    up: frozenset[WorkerId],
    policy: Policy,
    now: float,
) -> PlacementSnapshot:
    """Everything, at this moment."""
    return PlacementSnapshot(
        models=tuple(_need(state, demand, model, WARM * policy.horizon, now) for model in catalog.models),
        devices=tuple(_device(state, device, up) for device in catalog.devices),
        homes={model: _homes(state, model, now) for model in state.homes},
        busy=frozenset(state.migrations),
        policy=policy,
    )


def _homes(state: ControllerState, model: ModelId, now: float) -> tuple[Home, ...]:
    """With the ends of its migration: it takes room on both."""
    homes, migration = state.homes[model], state.migrations.get(model)
    ends = () if migration is None else (migration.source, migration.target)
    known = {home.worker for home in homes}
    return (*homes, *(Home(worker, now) for worker in ends if worker is not None and worker not in known))


def _device(state: ControllerState, device: DeviceState, up: frozenset[WorkerId]) -> DeviceState:
    report = state.reports.get(device.worker)
    is_up = device.worker in up
    if report is None:
        return replace(device, is_up=is_up)
    memory = report.num_slabs * report.slab_bytes
    return replace(device, memory_bytes=memory, slab_bytes=report.slab_bytes, is_up=is_up)


def _is_warm(report: ModelReport, warm: float) -> bool:
    """In memory, and used not long ago."""
    return report.state is ModelState.ACTIVE and not report.is_ahead and report.idle_seconds < warm


def _stays(state: ControllerState, model: ModelNeed) -> bool:
    """Pinned where it lives, and neither sent away from there nor unable to come, as its worker sees it."""
    name, workers = model.model, state.workers(model.model)
    known = [(worker, report) for worker in workers if (report := state.report_of(worker, name)) is not None]
    if not known:
        return model.is_pinned
    return any(
        report.pinned and report.state is not ModelState.FAILED and name not in state.sent_away(worker)
        for worker, report in known
    )


def _need(
    state: ControllerState,
    demand: DemandWindow,
    model: ModelNeed,
    warm: float,
    now: float,
) -> ModelNeed:
    load = demand.load(model.model, now)
    newest = max(home.since for home in state.homes[model.model])
    reports = state.reports_of(model.model)
    is_asked_for = any(report.num_running + report.num_waiting for report in reports)
    is_warm = any(_is_warm(report, warm) for report in reports)
    is_kept = any(report.pinned for report in reports) if reports else model.is_pinned
    weights = max((report.weights_bytes for report in reports), default=0) or model.weights_bytes
    load_seconds = max((report.load_seconds for report in reports), default=0.0) or weights / LINK_BYTES
    cached = max((report.kv_cached_bytes for report in reports), default=0)
    num_cached = cached / max(1, model.kv_bytes_per_token)
    recompute = num_cached * load.busy / load.token_rate if load.token_rate else 0.0
    return replace(
        model,
        weights_bytes=weights,
        kv_floor_bytes=max((report.kv_floor_bytes for report in reports), default=model.kv_floor_bytes),
        token_rate=load.token_rate,
        compute=load.compute,
        request_rate=load.request_rate,
        late=load.late,
        is_still_late=demand.is_late_since(model.model, newest),
        blocked=load.blocked,
        noise=load.noise,
        replicated_at=state.replicated_at.get(model.model, float("inf")),
        move_seconds=load_seconds + recompute,
        is_wanted=is_asked_for or is_warm or is_kept,
        resident=state.resident(model.model),
        is_ahead=any(report.is_ahead for report in reports),
        is_pinned=_stays(state, model),
    )
