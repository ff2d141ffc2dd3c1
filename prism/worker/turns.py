"""Which model steps next, and for how many tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """Prompts in the time that the decodes' deadlines leave, else the model with the earliest deadline.

    1. While nobody decodes, the model with the earliest deadline takes all it can. Ties go to the one that
       has waited longest. All deadlines that have passed count as now, so that late models take turns:
       otherwise one with a long queue of late prompts would keep the others waiting until it has worked all
       of them off.
    2. Prompts, by deadline, get the time until the first decode is due, on any lane, after the decodes
       themselves have been done. So a stream that is ahead of its objective keeps no prompt waiting.
    3. Where that is too little for `LEAST_CHUNK` tokens, the earliest deadline decides, and prompts take so
       many all the same: they go on while decodes are late.
    """
    if not snapshot.runnable:
        return None
    budget = snapshot.max_batch_tokens
    decoding = [r for r in (*snapshot.runnable, *snapshot.neighbours) if r.num_decodes]
    if decoding and (prompting := [r for r in snapshot.runnable if r.prompt_tokens]):  # 2
        prompt = _earliest(prompting, now)
        chunk = _chunk(prompt, decoding, now)
        if chunk >= min(LEAST_CHUNK, prompt.prompt_tokens):
            return Turn(prompt.model, min(budget, chunk + prompt.num_decodes))
    first = _earliest(snapshot.runnable, now)  # 1, 3
    if first.prompt_tokens and decoding:
        return Turn(first.model, min(budget, LEAST_CHUNK + first.num_decodes))
    return Turn(first.model, budget)


def _earliest(runnable: Sequence[Runnable], now: float) -> Runnable:
    return min(runnable, key=lambda r: (max(r.deadline, now), r.last_turn, r.model))


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
