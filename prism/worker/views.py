"""Takes the snapshots that the worker's policies decide on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prism.engine.kv_layout import KvLayout
from prism.types import ModelId, ModelState, Rank
from prism.worker.candidates import decodes
from prism.worker.foresight import GROWTH
from prism.worker.models import Model
from prism.worker.requests import Ticket
from prism.worker.snapshot import (
    FAR,
    MOST_DECODES,
    AdmissionSnapshot,
    Arrival,
    ModelLoad,
    WaitingRequest,
)

if TYPE_CHECKING:
    from prism.worker.loop import Worker


def admission_snapshot(worker: Worker) -> AdmissionSnapshot:
    """Waiting requests and the room that models have for them."""
    active = _active(worker)
    by_deadline = worker.rules.by_deadline
    return AdmissionSnapshot(
        waiting=tuple(t.waiting or waiting_request(worker, t) for t in worker.requests.waiting),
        models={ModelId(m.name): _load(worker, m) for m in worker.models.values()},
        num_running_requests=len(worker.requests) - worker.requests.num_waiting,
        alone_is_running=any(
            ticket.submit.alone
            for name in worker.models
            for ticket in worker.requests.running_of(ModelId(name))
        ),
        busy=_busy(worker, active) if by_deadline else 0.0,
        stretch=_stretch(worker, active) if by_deadline else 1.0,
        horizon=_horizon(worker, active) if by_deadline else float("inf"),
        ttft=min((model.config.slo.ttft for model in active), default=0.0),
        owed_to_late=worker.owed_to_late,
        over_share=worker.accounts.over_share,
    )


def _active(worker: Worker) -> list[Model]:
    return [m for m in worker.models.values() if m.is_active and m.engine is not None]


def _busy(worker: Worker, active: Sequence[Model]) -> float:
    """Seconds of the prompts that engines hold and can go on with."""
    return sum(_backlog(worker, model) for model in active if not model.stalled_until)


def _stretch(worker: Worker, active: Sequence[Model]) -> float:
    """Decodes take the share of the time that their objectives ask for; prompts have the rest."""
    return 1 / (1 - min(MOST_DECODES, sum(_decode_share(worker, model) for model in active)))


class Estimate(NamedTuple):
    """What a request that waits is told."""

    position: int
    seconds: float


def estimate(worker: Worker, model: Model, deadline: float, tenant: str | None = None) -> Estimate:
    """For a request of this deadline: its place among those that wait, and when it would start.

    It starts when its model is there, and when the prompts before it have been computed beside the decodes.
    Those of tenants over their share come behind the others. What memory is lacking for is not known.
    """
    return estimate_behind(worker, model, deadline, queue_before(worker, deadline, tenant))


def queue_before(worker: Worker, deadline: float, tenant: str | None = None) -> Estimate:
    """The same but for what its model adds: for a report of all models it is worked out once."""
    ahead, seconds = 0, 0.0
    over = worker.accounts.over_beside(tenant, worker.models)
    own = (tenant in over, deadline)
    for ticket in worker.requests.waiting:
        waiting = ticket.waiting or waiting_request(worker, ticket)
        if (waiting.tenant in over, waiting.deadline) <= own:
            ahead += 1
            seconds += waiting.seconds
    active = _active(worker)
    return Estimate(ahead + 1, (_busy(worker, active) + seconds) * _stretch(worker, active))


def estimate_behind(worker: Worker, model: Model, deadline: float, queue: Estimate) -> Estimate:
    """See `estimate`."""
    if worker.rules.is_exclusive:
        return Estimate(queue.position, worker.tenancy.starts_in(worker, model, deadline - FAR))
    return Estimate(queue.position, max(ready_in(worker, model), queue.seconds))


def waiting_request(worker: Worker, ticket: Ticket) -> WaitingRequest:
    """As admission sees it; made once for each wait.

    Nothing in it changes meanwhile but how well costs and outputs are known.
    """
    submit = ticket.submit
    profile, costs = worker.models[ticket.model].profile, worker.costs.of(ticket.model)
    tokens = len(submit.prompt) + ticket.num_resumed + 1
    rest = max(1, round(GROWTH * _expected_rest(worker.models[ticket.model], ticket)))
    waiting = WaitingRequest(
        request_id=ticket.request_id,
        model=ticket.model,
        arrival=submit.arrival,
        deadline=submit.arrival + (submit.slo.ttft if worker.rules.by_deadline else FAR),
        expires=float("inf") if ticket.is_started else ticket.expires,
        num_sequences=len(ticket.open_choices),
        num_blocks=0 if profile is None else _blocks(profile.kv, tokens - 1, rest, len(ticket.open_choices)),
        alone=submit.alone,
        tenant=submit.tenant,
        seconds=0.0 if costs is None else costs.steps.prefill(tokens - 1),
    )
    if profile is not None:
        ticket.waiting = waiting
    return waiting


def _blocks(layout: KvLayout, prompt: int, rest: int, num_sequences: int) -> int:
    """Of a prompt that several sequences share, and what each of them adds."""
    return layout.num_blocks(prompt + rest) + (num_sequences - 1) * layout.num_blocks(rest)


def _expected_rest(model: Model, ticket: Ticket) -> float:
    """Tokens that each of a request's choices is going to draw."""
    drawn = ticket.num_resumed if not ticket.is_running else 0
    return min(model.output_lengths.expected_rest, max(1, ticket.submit.params.max_tokens - drawn))


def _blocks_to_come(worker: Worker, model: Model) -> int:
    """Blocks that the requests in an engine are expected to need beyond those that they have.

    Later choices that have not started are going to find the prompt that they share with the first.
    """
    kv, engine = model.kv, model.engine
    if kv is None or engine is None:
        return 0
    layout, expected = kv.layout, model.output_lengths.expected_rest
    running, waiting = engine.scheduler.running, engine.scheduler.waiting
    tokens = np.array([len(s.tokens) for s in running], np.float64)
    rest = np.minimum(expected, np.array([s.end for s in running], np.float64) - tokens)
    held = np.array([len(s.blocks) for s in running], np.float64)
    wanted = np.ceil((tokens + np.maximum(1, np.rint(GROWTH * rest))) / layout.tokens_per_block)
    blocks = int(np.maximum(0, wanted - held).sum())
    seen = {s.request_id for s in running} if waiting else set()
    for sequence in waiting:
        is_later = sequence.request_id in seen
        num_tokens = sequence.num_output if is_later else len(sequence.tokens)
        growth = max(1, round(GROWTH * min(expected, sequence.end - len(sequence.tokens))))
        blocks += layout.num_blocks(num_tokens + growth)
        seen.add(sequence.request_id)
    return blocks


def _backlog(worker: Worker, model: Model) -> float:
    """Seconds of the prompts that an engine holds."""
    costs, engine = worker.costs.of(model.name), model.engine
    if costs is None or engine is None:
        return 0.0
    sequences = (*engine.scheduler.prompts, *engine.scheduler.waiting)
    return sum(costs.steps.prefill(s.num_missing, s.num_computed) for s in sequences if s.num_missing > 1)


def _decode_share(worker: Worker, model: Model) -> float:
    """Share of the device's time that a model's streams need, each at its objective."""
    costs, engine = worker.costs.of(model.name), model.engine
    tpots = [t.tpot for t in worker.requests.running_of(model.name) if t.last_token is not None]
    if costs is None or engine is None or not tpots:
        return 0.0
    context = sum([s.num_computed for s in engine.scheduler.running])
    return costs.steps.decode(len(tpots), context) / max(min(tpots), 1e-3)


def _horizon(worker: Worker, active: Sequence[Model]) -> float:
    """Seconds of prompts that keep the device busy until the next decision: two full steps of the slowest."""
    known = [costs for m in active if (costs := worker.costs.of(m.name)) is not None]
    return max((2 * c.steps.prefill(worker.max_batch_tokens) for c in known), default=float("inf"))


def _load(worker: Worker, model: Model) -> ModelLoad:
    engine, kv = model.engine, model.kv
    return ModelLoad(
        model=model.name,
        state=model.state if model.is_open else ModelState.COLD,
        num_sequences=0 if engine is None else engine.scheduler.num_sequences,
        max_sequences=worker.max_batch_size,
        num_blocks=0 if kv is None else kv.num_free + kv.num_cached,
        num_slabs=0 if kv is None else obtainable_slabs(worker, model),
        blocks_per_slab=1 if kv is None else kv.layout.blocks_per_slab,
        num_blocks_to_come=_blocks_to_come(worker, model),
        stuck=_stuck(model),
        is_arriving=model.is_arriving and model.is_open,
        ready_in=ready_in(worker, model),
    )


def _stuck(model: Model) -> Rank | None:
    if model.engine is None or not model.stalled_until or model.engine.scheduler.running:
        return None
    return min((sequence.rank for sequence in model.engine.scheduler.waiting), default=None)


def ready_in(worker: Worker, model: Model) -> float:
    """Seconds until a model can run steps, if nothing but its load delays it."""
    costs = worker.costs.of(model.name)
    if model.is_active or costs is None:
        return 0.0
    share = 1.0 if model.load is None else 1.0 - model.load.progress
    return costs.activation * share


def obtainable_slabs(worker: Worker, model: Model) -> int:
    """Slabs that a model could still get without touching a running sequence, within its limit."""
    slabs = worker.device.pool.num_free + worker.device.pool.num_retiring
    for other in worker.models.values():
        if other is model or other.kv is None or not other.is_active:
            continue
        if not worker.requests.has_any(other.name) and not other.pinned:
            slabs += len(other.weight_slabs) + other.kv.num_slabs
        else:
            slabs += max(0, min(other.kv.num_gatherable, other.kv.num_slabs - other.kv_floor))
    if model.kv_limit is not None and model.kv is not None:
        slabs = min(slabs, max(0, model.kv_limit - model.kv.num_slabs))
    return slabs


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
        others_decode=any(map(decodes, others)),
        max_batch_tokens=max_batch_tokens,
    )
