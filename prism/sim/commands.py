"""What a controller does to a device and hears of it; mirrors `worker/commands.py`, `worker/reports.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prism.messages import ModelReport, Report
from prism.sim.device import SimDevice
from prism.sim.jobs import Job, Served
from prism.sim.model import SimModel
from prism.sim.ticks import to_seconds
from prism.types import ModelId, ModelState, WorkerId


def activate(device: SimDevice, served: Served, now: int) -> None:
    """Load a model now, behind those that have requests."""
    device.begin(now)
    device.learn(served).is_wanted = True
    device.poke()


def settle(device: SimDevice, living: Sequence[Served], now: int) -> None:
    """These models live here, and may come before anybody asks; others that have come so leave."""
    at_home = {device.learn(served) for served in living}
    if at_home == {model for model in device.models.values() if model.is_at_home}:
        return
    device.begin(now)
    for model in device.models.values():
        model.is_at_home = model in at_home
        if model.is_ahead and not model.is_at_home:
            if model.is_active:
                device.evict(model)
            else:
                device.cancel_load(model)
    device.poke()


def evict(device: SimDevice, name: ModelId, returns: bool, now: int) -> list[Job] | None:
    """Take a model off; what it had to do comes back. None: it has requests, and must not return them."""
    device.begin(now)
    model = device.models.get(name)
    if model is None:
        return []
    if model.tickets and not returns:
        return None
    model.is_wanted = False
    if model.is_active:
        device.evict(model)
    elif model.state is ModelState.LOADING:
        device.cancel_load(model)
    jobs = list(model.tickets.values())
    for job in jobs:
        device.withdraw(job)
        del model.tickets[job.request_id]
    model.state = ModelState.COLD
    device.poke()
    return jobs


def take_over(device: SimDevice, job: Job, now: int) -> None:
    """Go on with a request that another device had."""
    device.begin(now)
    device.arrive(job)
    device.poke()


def report(device: SimDevice, worker: WorkerId, models: Iterable[ModelReport]) -> Report:
    """A worker's message."""
    memory = device.memory
    return Report(
        worker=worker,
        device=worker,
        incarnation=1,
        epoch=1,
        slab_bytes=device.slab_bytes,
        num_slabs=memory.num_slabs,
        num_free_slabs=memory.free,
        models=list(models),
    )


def report_of(device: SimDevice, worker: WorkerId, now: int, *, is_for_placement: bool = True) -> Report:
    """A worker's state as controller and gateways see it: models that have been there.

    How long a model has been idle is of interest to placement alone, and otherwise not brought up to date.
    """
    device.stepper.account(now)
    reports = [_model_report(device, model, now, is_for_placement) for model in device.models.values()]
    return report(device, worker, reports)


def first_report(device: SimDevice, worker: WorkerId, models: Iterable[ModelId]) -> Report:
    """Where counting begins: nothing has run."""
    return report(device, worker, (_blank(model) for model in models))


def _blank(model: ModelId) -> ModelReport:
    return ModelReport(
        model=model,
        state=ModelState.COLD,
        weights_bytes=0,
        kv_used_bytes=0,
        kv_cached_bytes=0,
        kv_slab_bytes=0,
        kv_floor_bytes=0,
        kv_limit_bytes=None,
        num_running=0,
        num_waiting=0,
        load_progress=0.0,
        idle_seconds=0.0,
        num_activations=0,
        max_len=None,
        pinned=False,
    )


def _model_report(device: SimDevice, model: SimModel, now: int, is_for_placement: bool) -> ModelReport:
    """Of a model that has nothing to do the same again, as long as nothing has come of it: most are."""
    if model.tickets or (is_for_placement and model.state is not ModelState.COLD):
        return _new_report(device, model, now)
    seen, told = model.history(), model.idle_report
    if told is None or told[0] != seen:
        told = model.idle_report = seen, _new_report(device, model, now)
    return told[1]


def _new_report(device: SimDevice, model: SimModel, now: int) -> ModelReport:
    usage, slab, running = model.usage, device.slab_bytes, model.num_sequences
    is_here = model.state in (ModelState.LOADING, ModelState.ACTIVE)
    return ModelReport(
        model=model.name,
        state=model.state,
        weights_bytes=model.weight_slabs * slab if is_here else 0,
        kv_used_bytes=model.used_blocks * model.layout.block_bytes,
        kv_cached_bytes=0,
        kv_slab_bytes=model.kv_slabs * slab,
        kv_floor_bytes=0,
        kv_limit_bytes=None,
        num_running=running,
        num_waiting=len(model.tickets) - running,
        load_progress=float(model.is_active),
        idle_seconds=0.0 if model.tickets else to_seconds(now - model.last_used),
        num_activations=model.num_activations,
        max_len=None,
        pinned=model.is_pinned,
        is_ahead=model.is_ahead,
        load_seconds=model.served.costs.activation if model.num_activations else 0.0,
        num_started=usage.num_requests,
        prompt_tokens=usage.prompt_tokens,
        decoded_tokens=usage.decoded_tokens,
        device_seconds=usage.device_seconds,
        needed_seconds=usage.needed_seconds,
        num_late=usage.num_late,
        blocked_seconds=usage.blocked_seconds,
    )
