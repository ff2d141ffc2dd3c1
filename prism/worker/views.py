"""Takes the snapshots that the worker's policies decide on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prism.types import ModelId
from prism.worker.lanes import Lane
from prism.worker.models import Model
from prism.worker.requests import Requests, Ticket
from prism.worker.snapshot import (
    AdmissionSnapshot,
    Arrival,
    ModelLoad,
    Runnable,
    TurnSnapshot,
    WaitingRequest,
)

if TYPE_CHECKING:
    from prism.worker.loop import Worker


def admission_snapshot(worker: Worker) -> AdmissionSnapshot:
    """Waiting requests and the room that models have for them."""
    running = [ticket for ticket in worker.requests if ticket.is_running]
    return AdmissionSnapshot(
        waiting=tuple(_waiting(worker, t) for t in worker.requests if not t.is_running),
        models={ModelId(m.name): _load(worker, m) for m in worker.models.values()},
        num_running_requests=len(running),
        alone_is_running=any(ticket.submit.alone for ticket in running),
    )


def _waiting(worker: Worker, ticket: Ticket) -> WaitingRequest:
    submit = ticket.submit
    profile = worker.models[ticket.model].profile
    tokens = len(submit.prompt) + ticket.num_resumed + 1
    return WaitingRequest(
        request_id=ticket.request_id,
        model=ticket.model,
        arrival=submit.arrival,
        deadline=submit.arrival + submit.slo.ttft,
        expires=float("inf") if ticket.is_started else ticket.expires,
        num_sequences=len(ticket.open_choices),
        num_blocks=profile.kv.num_blocks(tokens) if profile is not None else 0,
        alone=submit.alone,
    )


def _load(worker: Worker, model: Model) -> ModelLoad:
    engine, kv = model.engine, model.kv
    blocks = 0
    if kv is not None:
        slabs = obtainable_slabs(worker, model)
        blocks = kv.num_free + kv.num_cached + slabs * kv.layout.blocks_per_slab
    return ModelLoad(
        model=model.name,
        state=model.state,
        num_sequences=0 if engine is None else engine.scheduler.num_sequences,
        max_sequences=worker.max_batch_size,
        num_obtainable_blocks=blocks,
        is_arriving=model.is_arriving,
    )


def obtainable_slabs(worker: Worker, model: Model) -> int:
    """Slabs that a model could still get without touching a running sequence, within its limit."""
    slabs = worker.device.pool.num_free + worker.device.pool.num_retiring
    for other in worker.models.values():
        if other is model or other.kv is None or not other.is_active:
            continue
        if not worker.requests.of_model(other.name) and not other.pinned:
            slabs += len(other.weight_slabs) + other.kv.num_slabs
        else:
            slabs += max(0, min(other.kv.num_gatherable, other.kv.num_slabs - other.kv_floor))
    if model.kv_limit is not None and model.kv is not None:
        slabs = min(slabs, max(0, model.kv_limit - model.kv.num_slabs))
    return slabs


def turn_snapshot(
    models: Mapping[str, Model], requests: Requests, max_batch_tokens: int, lane: Lane, now: float
) -> TurnSnapshot:
    """Models that could run the lane's next step. A queued step counts as one token more for all."""
    runnable = []
    for model in models.values():
        engine = model.engine
        if model.lane is not lane or not model.is_active or engine is None or now < model.stalled_until:
            continue
        if model.early is not None or not engine.scheduler.has_work:
            continue
        queued = engine.num_queued
        tickets = [t for t in requests.of_model(model.name) if t.is_running]
        deadlines = [t.next_deadline + queued * t.submit.slo.tpot for t in tickets]
        decodes = sum(s.num_missing == 1 for s in engine.scheduler.running)
        runnable.append(
            Runnable(
                model=model.name,
                deadline=min(deadlines),
                last_turn=model.last_turn,
                num_decodes=decodes,
            )
        )
    return TurnSnapshot(tuple(runnable), max_batch_tokens, neighbours_decode(models, lane))


def neighbours_decode(models: Mapping[str, Model], lane: Lane) -> bool:
    """Whether any model of another lane has sequences that draw tokens."""
    return any(_decodes(m) for m in models.values() if m.lane is not None and m.lane is not lane)


def _decodes(model: Model) -> bool:
    if not model.is_active or model.engine is None:
        return False
    return any(sequence.is_prompt_computed for sequence in model.engine.scheduler.running)


def arrival_of(model: Model, models: Mapping[str, Model], max_batch_tokens: int) -> Arrival:
    """What the choice of a loading model's first step depends on."""
    lane, load, engine = model.lane, model.load, model.engine
    assert lane is not None and load is not None and engine is not None
    others = [other for other in models.values() if other is not model]
    return Arrival(
        has_work=engine.scheduler.has_work,
        is_readable=model.is_readable,
        has_stepped=model.has_stepped_early,
        is_cancelled=load.is_cancelled,
        is_lane_taken=(
            lane.launching is not None
            or not lane.is_apart_free
            or any(other.early is not None and other.lane is lane for other in others)
        ),
        others_decode=any(map(_decodes, others)),
        max_batch_tokens=max_batch_tokens,
    )


def kv_capacity_tokens(worker: Worker, model: Model) -> int:
    """Tokens of one sequence that the model could hold if all others gave what they must."""
    profile = model.profile
    assert profile is not None
    slabs = worker.device.num_slabs - profile.weight_slabs
    for other in worker.models.values():
        if other is not model and other.pinned and other.profile is not None:
            slabs -= other.profile.weight_slabs + other.kv_floor
    if model.kv_limit is not None:
        slabs = min(slabs, model.kv_limit)
    return max(0, slabs) * profile.kv.blocks_per_slab * profile.kv.tokens_per_block
