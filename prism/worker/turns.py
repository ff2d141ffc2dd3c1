"""Which model steps next, and for how many tokens. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from prism.types import ModelId
from prism.worker.snapshot import Arrival, TurnSnapshot

SHARED_CHUNK = 512
"""Prompt tokens of a step while other models decode: bounds how long their next tokens wait."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Run one step of a model with at most `budget` tokens."""

    model: ModelId
    budget: int


def decide(snapshot: TurnSnapshot, now: float) -> Turn | None:
    """The model with the earliest next-token deadline; ties go to the one that has waited longest.

    All deadlines that have passed count as now, so that late models take turns: otherwise one with a long
    queue of late prompts would keep the others waiting until it has worked all of them off.
    """
    if not snapshot.runnable:
        return None
    first = min(snapshot.runnable, key=lambda r: (max(r.deadline, now), r.last_turn, r.model))
    others_decode = snapshot.neighbours_decode or any(
        r.num_decodes for r in snapshot.runnable if r.model != first.model
    )
    budget = snapshot.max_batch_tokens
    if others_decode:
        budget = min(budget, SHARED_CHUNK + first.num_decodes)
    return Turn(first.model, budget)


def decide_early(arrival: Arrival) -> int | None:
    """Tokens of the one step that a model may run while it is being loaded; None: no step now.

    It does not take turns: it goes on whenever weights arrive, so the device is hardly busy with it. But each
    of its layers stands before what its neighbours do next, so beside them it is a small step.
    """
    if arrival.is_cancelled or arrival.has_stepped or arrival.is_lane_taken:
        return None
    if not arrival.is_readable or not arrival.has_work:
        return None
    return min(arrival.max_batch_tokens, SHARED_CHUNK) if arrival.others_decode else arrival.max_batch_tokens
