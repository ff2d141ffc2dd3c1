"""Which model steps next, and for how many tokens. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from prism.costs import MOST_TOKENS, StepCosts
from prism.types import ModelId
from prism.worker.snapshot import Arrival, Runnable, Streams, TurnSnapshot

SHARED_CHUNK = 512
"""Prompt tokens of a step that is launched as weights arrive, beside others that decode."""
LEAST_CHUNK = 128
"""Prompt tokens of a step whatever the slack: prompts go on while decodes are late."""
LEAST_READS = 4
"""It may take as long as so many of one token, context apart: a step of few tokens mostly reads weights."""
MARGIN = 0.9
"""Of the slack that a chunk may use: costs are predictions."""
DECODE_SHARE = 0.8
"""Of a lane's time, what streams may need that are kept in time; the rest is for prompts."""
PATIENCE = 8
"""TPOT objectives within which streams have a step all the same, given up or late behind prompts."""
WORTH_SHARING = 0.25
"""Of the time that a prompt takes alone, what it must save to join others in their step: they wait for it."""
NOBODY: frozenset[ModelId] = frozenset()


@dataclass(frozen=True, slots=True)
class Turn:
    """Run one step of a model with at most `budget` tokens."""

    model: ModelId
    budget: int


def decide(snapshot: TurnSnapshot, now: float) -> Turn | None:
    """Prompts in the time that the decodes' deadlines leave, else the model with the earliest deadline.

    1. Where a lane's streams need more than its time, some are given up, that the others be in time
       (`given_up`): they are due only when they have waited for `PATIENCE`.
    2. While nobody decodes, the model with the earliest deadline takes all it can. Ties go to the one that
       has waited longest. All deadlines that have passed count as now, so that late models take turns:
       otherwise one with a long queue of late prompts would keep the others waiting until it has worked all
       of them off.
    3. Prompts, by deadline, get the time until the first decode is due, on any lane, after the decodes
       themselves have been done. So a stream that is ahead of its objective keeps no prompt waiting.
    4. One that is late already does not either, if the prompt can be in time: of two, one is. The prompt
       takes no more than the least chunk then, and decodes wait for `PATIENCE` at most.
    5. Where there is too little time for the least chunk, the earliest deadline decides, and prompts take so
       many tokens all the same: they go on while decodes are late.
    6. A step's prompts all have their first tokens at its end, so no more of them share it than it saves time
       for, and none is cut where whole ones fill the half of it (`_shared`).
    """
    if not snapshot.runnable:
        return None
    runnable, budget = snapshot.runnable, snapshot.max_batch_tokens
    lost = given_up(runnable)  # 1
    prompting = [r for r in runnable if r.prompt_tokens]
    decoding = [r for r in (*runnable, *snapshot.neighbours) if r.num_decodes] if prompting else []
    if decoding:  # 3
        prompt = _earliest(prompting, lost, now)
        least = _least_chunk(prompt.costs)
        chunk = _chunk(prompt, least, decoding, lost, now)
        if chunk >= min(least, prompt.prompt_tokens):
            return Turn(prompt.model, min(budget, _shared(prompt, chunk) + prompt.num_decodes))  # 6
    first = _earliest(runnable, lost, now)  # 2, 5
    if not first.prompt_tokens:
        return Turn(first.model, budget)
    chunk = _shared(first, _least_chunk(first.costs) if decoding else budget)  # 6
    return Turn(first.model, min(budget, chunk + first.num_decodes))


def given_up(runnable: Iterable[Runnable]) -> frozenset[ModelId]:
    """Models of a lane whose streams are not kept in time.

    Those are kept whose streams need the least of the lane's time each, as long as `DECODE_SHARE` suffices:
    that makes the most streams. Were all served by deadline, all would be late by what is lacking.
    """
    return beyond_share([r.streams for r in runnable if r.streams is not None])


def beyond_share(streams: Sequence[Streams]) -> frozenset[ModelId]:
    """See `given_up`."""
    if sum([each.share for each in streams]) <= DECODE_SHARE:
        return NOBODY
    left, lost = DECODE_SHARE, []
    for _, model, share in sorted(streams):
        if share <= left or left == DECODE_SHARE:  # one is kept whatever it needs
            left -= share
        else:
            lost.append(model)
    return frozenset(lost)


def _patient(r: Runnable, deadline: float) -> float:
    """When streams are due that have been given up."""
    due = r.last_turn + PATIENCE * r.tpot
    return due if due > deadline else deadline


def _earliest(runnable: Iterable[Runnable], lost: Set[ModelId], now: float) -> Runnable:
    """By deadline, those that have passed alike; then by the last turn and name."""
    keys = []
    for r in runnable:
        due = r.due
        if r.model in lost:
            due = _patient(r, r.deadline)
            due = due if due < r.prompt_deadline else r.prompt_deadline
        keys.append((due if due > now else now, r.last_turn, r.model, r))
    return min(keys)[-1]


@lru_cache(maxsize=256)
def _least_chunk(costs: StepCosts | None) -> int:
    """Kept for the latest costs, which never change: corrected ones are others."""
    if costs is None:
        return LEAST_CHUNK
    return max(LEAST_CHUNK, costs.tokens_within(LEAST_READS * costs.gemm(1)))


def _shared(r: Runnable, chunk: int) -> int:
    """Of a chunk, the prompts that are better off in one step than in several."""
    costs = r.costs
    if costs is None or len(r.prompts) < 2:
        return chunk
    again = max(0.0, r.decode_seconds - costs.gemm(r.num_decodes)) if r.num_decodes else 0.0
    tokens, seconds = 0, 0.0
    for length in r.prompts:
        alone = costs.gemm(length, has_prompts=True)
        together = costs.gemm(tokens + length, has_prompts=True)
        saved = seconds + alone + again - together  # what pairs cost is the same
        if tokens and saved < WORTH_SHARING * costs.prefill(length):
            return min(chunk, tokens)
        if tokens + length > chunk:
            return tokens if tokens >= chunk / 2 else chunk
        tokens, seconds = tokens + length, together
    return chunk


def _chunk(first: Runnable, least: int, decoding: Iterable[Runnable], lost: Set[ModelId], now: float) -> int:
    """Prompt tokens that fit before the first decode is due.

    The decodes of the chosen model are part of its step. Others follow one after the other in the order of
    their deadlines, so each must leave time for those before it.
    """
    if first.costs is None:
        return 0
    slack, most = float("inf"), MOST_TOKENS
    before = 0.0
    is_in_time = first.prompt_deadline > now
    dues = [
        (_patient(r, r.decode_deadline) if r.model in lost else r.decode_deadline, r.model, r)
        for r in decoding
    ]
    for due, model, r in sorted(dues):
        if model != first.model:
            before += r.decode_seconds
        left = due - now - before
        if left <= 0 and is_in_time and now < r.last_turn + PATIENCE * r.tpot:  # 4
            most = least
        else:
            slack = min(slack, left)
    if slack == float("inf"):
        return min(most, first.prompt_tokens)
    within = first.costs.tokens_within(MARGIN * slack - first.decode_seconds, first.prompt_start)
    return min(most, within)


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
