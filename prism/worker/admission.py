"""Which waiting requests enter their engines now. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prism.types import ModelId, ModelState, RequestId
from prism.worker.snapshot import AdmissionSnapshot, WaitingRequest


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the request to its engine."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Expire:
    """Refuse the request: it has waited for as long as it may."""

    request_id: RequestId


AdmissionDecision = Admit | Expire


def decide(snapshot: AdmissionSnapshot, now: float) -> tuple[AdmissionDecision, ...]:
    """Earliest deadline first within each model, bounded by batch size and memory.

    1. A request that has waited too long expires.
    2. While a suspect runs alone, nobody else enters.
    3. The oldest suspect enters once nothing runs, and alone; while it waits, nobody overtakes it.
    4. Requests of models that are not active wait for them, or until a load has come so far that the first
       step can follow it.
    5. Batch size and memory bound what enters; a request that does not fit holds back those behind it in its
       model, so that small ones cannot starve a large one. An idle model always takes one.
    """
    expired = tuple(Expire(r.request_id) for r in snapshot.waiting if r.expires <= now)  # 1
    waiting = [r for r in snapshot.waiting if r.expires > now]
    if snapshot.alone_is_running:  # 2
        return expired
    suspects = [r for r in waiting if r.alone and _is_active(snapshot, r.model)]
    if suspects:  # 3
        first = min(suspects, key=lambda r: (r.arrival, r.request_id))
        return expired if snapshot.num_running_requests else (*expired, Admit(first.request_id))
    return (*expired, *_admit(snapshot, [r for r in waiting if not r.alone]))


def _is_active(snapshot: AdmissionSnapshot, model: ModelId) -> bool:
    return snapshot.models[model].state is ModelState.ACTIVE


def _admit(snapshot: AdmissionSnapshot, waiting: list[WaitingRequest]) -> Iterator[Admit]:
    sequences = {name: load.num_sequences for name, load in snapshot.models.items()}
    blocks = {name: load.num_obtainable_blocks for name, load in snapshot.models.items()}
    blocked: set[ModelId] = set()
    for request in sorted(waiting, key=lambda r: (r.deadline, r.arrival, r.request_id)):
        model = request.model
        load = snapshot.models[model]
        if model in blocked or not (load.state is ModelState.ACTIVE or load.is_arriving):  # 4
            continue
        room = load.max_sequences - sequences[model]
        fits = request.num_sequences <= room and request.num_blocks <= blocks[model]
        if fits or sequences[model] == 0:  # 5
            sequences[model] += request.num_sequences
            blocks[model] -= request.num_blocks
            yield Admit(request.request_id)
        else:
            blocked.add(model)
