"""What a worker tells about itself."""

from __future__ import annotations

from prism.messages import ModelReport, Report
from prism.types import ModelState
from prism.worker.loop import Worker
from prism.worker.models import Model
from prism.worker.views import Estimate, estimate_behind, queue_before

NEVER = float("inf")


def make_report(worker: Worker, now: float) -> Report:
    """The worker's state as one message."""
    pool, queue = worker.device.pool, queue_before(worker, NEVER)
    return Report(
        worker=worker.name,
        device=worker.device.name,
        incarnation=worker.incarnation,
        epoch=worker.epoch,
        slab_bytes=pool.slab_bytes,
        num_slabs=pool.num_slabs,
        num_free_slabs=pool.num_free,
        registered_bytes=0 if worker.registrations is None else worker.registrations.total_bytes,
        registration_error=None if worker.registrations is None else worker.registrations.error,
        kv_host_bytes=worker.host.total_bytes,
        kv_host_error=worker.host.error,
        tenants=worker.accounts.report(),
        models=[_model(worker, model, queue, now) for model in worker.models.values()],
    )


def _model(worker: Worker, model: Model, queue: Estimate, now: float) -> ModelReport:
    slab = worker.device.slab_bytes
    kv = model.kv
    block = 0 if kv is None else kv.layout.block_bytes
    tickets = worker.requests.of_model(model.name)
    running = sum(ticket.is_running for ticket in tickets)
    return ModelReport(
        model=model.name,
        state=model.state,
        weights_bytes=len(model.weight_slabs) * slab,
        kv_used_bytes=0 if kv is None else kv.num_used * block,
        kv_cached_bytes=0 if kv is None else kv.num_cached * block,
        kv_host_bytes=worker.host.blocks.bytes_of(model.name),
        kv_slab_bytes=0 if kv is None else kv.num_slabs * slab,
        kv_floor_bytes=model.kv_floor * slab,
        kv_limit_bytes=None if model.kv_limit is None else model.kv_limit * slab,
        num_running=running,
        num_waiting=len(tickets) - running,
        load_progress=_progress(model),
        idle_seconds=0.0 if tickets else max(0.0, now - model.last_used) if model.last_used else 0.0,
        num_activations=model.num_activations,
        max_len=worker.max_len(model),
        pinned=model.pinned,
        is_ahead=model.is_ahead,
        is_sent_away=model.is_sent_away,
        error=model.error,
        estimated_wait=estimate_behind(worker, model, NEVER, queue).seconds if tickets else 0.0,
        load_seconds=model.load_seconds,
        num_started=model.usage.num_requests,
        prompt_tokens=model.usage.prompt_tokens,
        decoded_tokens=model.usage.decoded_tokens,
        device_seconds=model.usage.device_seconds,
        needed_seconds=model.usage.needed_seconds,
        num_late=model.usage.num_late,
        blocked_seconds=list(model.usage.blocked_seconds),
        registered_bytes=(
            0 if worker.registrations is None else worker.registrations.registered_bytes(model.name)
        ),
    )


def _progress(model: Model) -> float:
    match model.state:
        case ModelState.ACTIVE:
            return 1.0
        case ModelState.LOADING if model.load is not None:
            return model.load.progress
        case ModelState.FETCHING:
            return model.packed_share
        case _:
            return 0.0
