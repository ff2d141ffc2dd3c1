"""Takes the snapshots that the shipped policies decide on; mirrors `worker/views.py` and `candidates.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from prism.modes import Rules
from prism.sim.jobs import Job, policy_rank
from prism.sim.link import Link
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.overlap import Longer, alone
from prism.sim.ticks import NEVER, to_seconds, to_ticks
from prism.types import ModelId, ModelState, Rank
from prism.worker.snapshot import FAR, MOST_DECODES, AdmissionSnapshot, ModelLoad, Runnable, WaitingRequest


def admission_snapshot(
    waiting: Mapping[Job, WaitingRequest],
    models: Mapping[ModelId, SimModel],
    memory: Memory,
    link: Link,
    rules: Rules,
    limits: Limits,
    now: int,
    owed_to_late: float,
) -> AdmissionSnapshot:
    """Waiting requests and the room that their models have for them."""
    requests = (
        waiting.values() if rules.by_deadline else _heads(waiting.values(), models, limits, to_seconds(now))
    )
    active = [model for model in models.values() if model.tickets and model.num_sequences]
    names = {request.model for request in requests} | {model.name for model in active}
    obtainable = memory.obtainable_at_all()
    loads = {name: _load(models[name], memory, obtainable, link, limits, now) for name in sorted(names)}
    return AdmissionSnapshot(
        waiting=tuple(requests),
        models=loads,
        num_running_requests=sum(model.num_sequences for model in active),
        alone_is_running=False,
        busy=sum(_prompt_seconds(model) for model in active if not model.is_stalled)
        if rules.by_deadline
        else 0.0,
        stretch=_stretch(active) if rules.by_deadline else 1.0,
        horizon=limits.horizon if rules.by_deadline else float("inf"),
        ttft=min((model.served.slo.ttft for model in models.values() if model.is_active), default=0.0),
        owed_to_late=owed_to_late,
    )


def _heads(
    requests: Iterable[WaitingRequest], models: Mapping[ModelId, SimModel], limits: Limits, now: float
) -> Collection[WaitingRequest]:
    """Without deadlines, what its model's batch has no place for is looked at only to be refused."""
    counts: dict[ModelId, int] = defaultdict(int)
    heads = []
    for request in requests:
        counts[request.model] += 1
        room = limits.max_batch_size - models[request.model].num_sequences
        if counts[request.model] <= room or request.expires <= now:
            heads.append(request)
    return heads


def waiting_request(job: Job, model: SimModel, rules: Rules, limits: Limits) -> WaitingRequest:
    """A request that waits for its admission. It stays the same while it waits."""
    arrival = to_seconds(job.arrival)
    return WaitingRequest(
        request_id=job.request_id,
        model=job.model,
        arrival=arrival,
        deadline=to_seconds(job.due) if rules.by_deadline else arrival + FAR,
        expires=float("inf") if job.is_started else to_seconds(expiry(job, limits)),
        num_sequences=1,
        num_blocks=model.layout.num_blocks(job.known + model.expected_growth),
        alone=False,
        seconds=model.served.costs.steps.prefill(job.known),
    )


def expiry(job: Job, limits: Limits) -> int:
    """When a request that has not started is refused."""
    return job.arrival + to_ticks(limits.max_wait)


def _load(
    model: SimModel, memory: Memory, obtainable: int, link: Link, limits: Limits, now: int
) -> ModelLoad:
    return ModelLoad(
        model=model.name,
        state=model.state if model.is_open else ModelState.COLD,
        num_sequences=model.num_sequences,
        max_sequences=limits.max_batch_size,
        num_blocks=model.free_blocks if model.is_active else 0,
        num_slabs=memory.obtainable(model, obtainable) if model.is_active else 0,
        blocks_per_slab=model.layout.blocks_per_slab,
        num_blocks_to_come=model.blocks_to_come(),
        stuck=_stuck(model),
        ready_in=_ready_in(model, link, now),
    )


def _stuck(model: SimModel) -> Rank | None:
    if not model.is_stalled or model.decodes.size or model.prompts or not model.waiting:
        return None
    return policy_rank(model.waiting[0])


def _ready_in(model: SimModel, link: Link, now: int) -> float:
    """Seconds until the model can run steps, if it is loaded next."""
    if model.is_active:
        return 0.0
    if model.state is ModelState.LOADING:
        return to_seconds(link.ready_at(model) - now)
    return model.served.costs.activation


def _prompt_seconds(model: SimModel) -> float:
    steps = model.served.costs.steps
    return sum(steps.prefill(job.missing, job.computed) for job in model.unstarted())


def _stretch(models: Iterable[SimModel]) -> float:
    """Decodes take the share of the time that their objectives ask for; prompts have the rest."""
    share = 0.0
    for model in models:
        if model.decodes.size:
            share += model.decode_seconds() / model.served.slo.tpot
    return 1.0 / (1.0 - min(share, MOST_DECODES))


def runnable(model: SimModel, rules: Rules, longer: Longer = alone) -> Runnable:
    """A model that could take a turn. Decodes take `longer` beside those of other lanes.

    Without deadlines all are due at once, so they take turns.
    """
    decodes, steps = model.decodes.size, model.served.costs.steps
    due = model.due if decodes else NEVER
    by_deadline = rules.by_deadline
    tokens = start = 0
    lengths: tuple[int, ...] = ()
    prompt_due = NEVER
    if model.prompts or model.waiting:
        prompts = list(model.unstarted())
        lengths = tuple(job.missing for job in prompts)
        tokens, start = sum(lengths), prompts[0].computed
        prompt_due = min(_next_due(job, model) for job in prompts)
    return Runnable(
        model=model.name,
        deadline=_seconds(min(due, prompt_due)) if by_deadline else 0.0,
        last_turn=to_seconds(model.last_turn),
        num_decodes=decodes,
        decode_deadline=_seconds(due if by_deadline else NEVER),
        decode_seconds=longer(model) * model.decode_seconds() if decodes else 0.0,
        prompt_tokens=tokens,
        prompts=lengths if by_deadline else (),
        prompt_start=start,
        costs=steps,
        prompt_deadline=_seconds(prompt_due),
        tpot=model.served.slo.tpot if by_deadline else float("inf"),
    )


def _seconds(due: int) -> float:
    return float("inf") if due == NEVER else to_seconds(due)


def _next_due(job: Job, model: SimModel) -> int:
    return job.due if job.first_token is None else job.last_token + model.tpot
