"""Which model steps next, and for how many tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prism.types import ModelId
from prism.worker.snapshot import Arrival, Runnable, TurnSnapshot

SHARED_CHUNK = 512
"""Prompt tokens of a step that is launched as weights arrive, beside others that decode."""
LEAST_CHUNK = 128
"""Prompt tokens of a step whatever the slack: prompts go on while decodes are late."""
MARGIN = 0.9
"""Of the slack that a chunk may use: costs are predictions."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Run one step of a model with at most `budget` tokens."""

    model: ModelId
    budget: int


def decide(snapshot: TurnSnapshot, now: float) -> Turn | None:
    """The model with the earliest deadline, with as many prompt tokens as the others' deadlines leave time
    for.

    1. The model with the earliest next-token deadline; ties go to the one that has waited longest. All
       deadlines that have passed count as now, so that late models take turns: otherwise one with a long
       queue of late prompts would keep the others waiting until it has worked all of them off.
    2. Without prompts, or while nobody decodes, a step takes all it can.
    3. Else prompts get the time until the first decode is due, its own model's and those of all lanes, after
       the decodes themselves have been done; at least `LEAST_CHUNK` tokens.
    """
    if not snapshot.runnable:
        return None
    first = min(snapshot.runnable, key=lambda r: (max(r.deadline, now), r.last_turn, r.model))  # 1
    budget = snapshot.max_batch_tokens
    decoding = [r for r in (*snapshot.runnable, *snapshot.neighbours) if r.num_decodes]
    if not first.prompt_tokens or not decoding:  # 2
        return Turn(first.model, budget)
    chunk = max(LEAST_CHUNK, _chunk(first, decoding, now))  # 3
    return Turn(first.model, min(budget, chunk + first.num_decodes))


def _chunk(first: Runnable, decoding: Iterable[Runnable], now: float) -> int:
    """Prompt tokens that fit before the first decode is due.

    The decodes of the chosen model are part of its step. Others follow one after the other in the order of
    their deadlines, so each must leave time for those before it.
    """
    if first.costs is None:
        return 0
    slack = float("inf")
    before = 0.0
    for other in sorted(decoding, key=lambda r: (r.decode_deadline, r.model)):
        if other.model != first.model:
            before += other.decode_seconds
        slack = min(slack, other.decode_deadline - now - before)
    if slack == float("inf"):
        return first.prompt_tokens
    return first.costs.tokens_within(MARGIN * slack - first.decode_seconds, first.prompt_start)


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
