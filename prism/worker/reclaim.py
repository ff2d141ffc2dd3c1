"""Where slabs come from when a model needs more of them. Pure.

One decision at a time: the worker carries it out and asks again until the need is met or nothing is left
to give. Requests rank by arrival. Running work gives way only to older requests, so that the oldest one of a
device always gets what it needs, and no two models can take memory from each other in turns.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism.types import ModelId
from prism.worker.snapshot import Holding, MemorySnapshot, Need


@dataclass(frozen=True, slots=True)
class TakeEmpty:
    """Take parked empty slabs of a model."""

    model: ModelId
    slabs: int


@dataclass(frozen=True, slots=True)
class DropOwnCache:
    """The needy model drops its own least recently used cached blocks, one slab's worth."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class DropCache:
    """Another model drops cached blocks until so many of its slabs are free."""

    model: ModelId
    slabs: int


@dataclass(frozen=True, slots=True)
class EvictModel:
    """A model gives up its weights and all its KV; what it was running starts again later."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class PreemptYoungest:
    """A model's youngest running sequence gives its blocks back and is recomputed later."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """A model that nobody waits for any more is not loaded after all."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class AwaitRetirement:
    """Nothing to do: enough slabs are on their way to the free list."""


ReclaimDecision = (
    TakeEmpty | DropOwnCache | DropCache | EvictModel | PreemptYoungest | CancelLoad | AwaitRetirement
)


def decide(snapshot: MemorySnapshot, need: Need, now: float) -> ReclaimDecision | None:
    """The next step towards `need`, or None when nobody can or must give.

    1. Beyond its KV limit a model only recycles its own cache.
    2. Slabs that are retiring are awaited.
    3. Loads that nobody waits for any more.
    4. Parked empty slabs of other models, above their floors.
    5. Prefix caches, cheapest to recompute per byte and second first, above floors; the model's own too.
    6. Idle models, least recently used first; not pinned.
    7. Running sequences of other models, youngest first, if they are younger than the need.
    8. A busy model all of whose requests are younger than the need and which has been active for
       `min_residency`.
    """
    own = next((h for h in snapshot.holdings if h.model == need.model), None)
    others = [h for h in snapshot.holdings if h.model != need.model and h.is_active]
    if own is not None and not need.for_weights and _at_limit(own):  # 1
        return DropOwnCache(own.model) if own.num_cached_blocks else None
    if snapshot.num_retiring >= need.slabs:  # 2
        return AwaitRetirement()
    if snapshot.unwanted_loads:  # 3
        return CancelLoad(snapshot.unwanted_loads[0])
    missing = need.slabs - snapshot.num_retiring
    for other in others:  # 4
        spare = min(missing, other.empty_slabs, other.kv_slabs - other.kv_floor)
        if spare > 0:
            return TakeEmpty(other.model, spare)
    return (
        _cheapest_cache(own if not need.for_weights else None, others, missing, now)  # 5
        or _idle_model(others)  # 6
        or _running(others, need)  # 7
        or _busy_model(others, need, snapshot.min_residency, now)  # 8
    )


def _at_limit(own: Holding) -> bool:
    return own.kv_limit is not None and own.kv_slabs >= own.kv_limit


def _cheapest_cache(
    own: Holding | None, others: list[Holding], missing: int, now: float
) -> ReclaimDecision | None:
    """A cache is worth what its recomputation costs, less the longer nobody has used it."""
    candidates = [h for h in others if h.gatherable_slabs and h.kv_slabs > h.kv_floor]
    if own is not None and own.num_cached_blocks:
        candidates.append(own)
    if not candidates:
        return None
    cheapest = min(candidates, key=lambda h: (h.recompute_cost / (1.0 + now - h.last_used), h.model))
    if cheapest is own:
        return DropOwnCache(cheapest.model)
    spare = min(missing, cheapest.gatherable_slabs, cheapest.kv_slabs - cheapest.kv_floor)
    return DropCache(cheapest.model, spare)


def _idle_model(others: list[Holding]) -> ReclaimDecision | None:
    idle = [h for h in others if h.is_idle and not h.is_pinned]
    return EvictModel(min(idle, key=lambda h: (h.last_used, h.model)).model) if idle else None


def _running(others: list[Holding], need: Need) -> ReclaimDecision | None:
    younger = [
        (h.youngest_running, h.model)
        for h in others
        if h.youngest_running is not None and h.youngest_running > need.arrival and h.kv_slabs > h.kv_floor
    ]
    return PreemptYoungest(max(younger)[1]) if younger else None


def _busy_model(
    others: list[Holding], need: Need, min_residency: float, now: float
) -> ReclaimDecision | None:
    younger = [
        h
        for h in others
        if not h.is_pinned
        and h.oldest_request is not None
        and h.oldest_request > need.arrival
        and now - h.active_since >= min_residency
    ]
    return EvictModel(max(younger, key=lambda h: (h.oldest_request, h.model)).model) if younger else None
