"""Where slabs come from when a model needs more of them. Pure.

Two rules. **Who may take**: work that runs gives way only to older requests, by a rank that no two sequences
share, and a need has the rank of the very sequence that lacks memory. So the oldest one of a device always
gets what it needs, and no two can take memory from each other in turns. **Who gives**: of what may be taken
the cheapest that suffices, across all models and all kinds of memory (offers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prism.types import ModelId
from prism.worker.offers import Offer, Part, offers_of, own_offers
from prism.worker.snapshot import Holding, MemorySnapshot, Need


@dataclass(frozen=True, slots=True)
class TakeSlabs:
    """A model gives slabs up: empty ones, then those that only its prefix cache fills."""

    model: ModelId
    slabs: int


@dataclass(frozen=True, slots=True)
class DropOwnCache:
    """The needy model drops its own least recently used cached blocks."""

    model: ModelId
    blocks: int


@dataclass(frozen=True, slots=True)
class Preempt:
    """A model's youngest running sequences give their blocks back and go on later."""

    model: ModelId
    count: int


@dataclass(frozen=True, slots=True)
class EvictModel:
    """A model gives up its weights and all its KV; what it was running starts again later."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class CancelLoad:
    """A model that nobody waits for any more is not loaded after all."""

    model: ModelId


ReclaimDecision = TakeSlabs | DropOwnCache | Preempt | EvictModel | CancelLoad


def decide(snapshot: MemorySnapshot, need: Need, now: float) -> tuple[ReclaimDecision, ...]:
    """What to take for `need`; nothing if the slabs are on their way, or nobody can or must give.

    1. Beyond its KV limit a model only recycles its own cache.
    2. Slabs that are retiring are awaited.
    3. Loads that nobody waits for any more are called off.
    4. The cheapest offers that suffice together.
    5. If all offers together do not: weights take nothing, since a part of them is of no use; for KV all of
       it is taken, since each block lets a sequence go on.
    """
    own = next((h for h in snapshot.holdings if h.model == need.model), None)
    if own is not None and not need.for_weights and _is_at_limit(own):  # 1
        blocks = min(own.num_cached_blocks, need.blocks)
        return (DropOwnCache(own.model, blocks),) if blocks else ()
    need = replace(need, slabs=need.slabs - snapshot.num_retiring)
    if need.slabs <= 0:  # 2
        return ()
    if snapshot.unwanted_loads:  # 3
        return tuple(CancelLoad(model) for model in snapshot.unwanted_loads)
    offers = {
        h.model: offers_of(h, need, snapshot, now)
        for h in snapshot.holdings
        if h.model != need.model and h.is_active
    }
    if own is not None and not need.for_weights:
        offers[own.model] = own_offers(own, need)
    most = sum(offer.slabs for each in offers.values() for offer in each)
    if most < need.slabs and need.for_weights:  # 5
        return ()
    taken = _cheapest(offers, min(need.slabs, most), snapshot.expected_demand)  # 4
    holdings = {h.model: h for h in snapshot.holdings}
    return tuple(d for model, part in taken.items() for d in _decisions(holdings[model], part, need))


def _is_at_limit(own: Holding) -> bool:
    return own.kv_limit is not None and own.kv_slabs >= own.kv_limit


def _cheapest(
    offers: Mapping[ModelId, Sequence[Offer]], missing: int, expected: float
) -> dict[ModelId, list[Offer]]:
    """Greedily by harm per slab; then without what turned out not to be necessary.

    An offer of more slabs than are missing counts with those that are expected to be asked for soon beside
    them: a whole model is not dropped for one block, unless blocks are wanted all the time.
    """
    taken: dict[ModelId, list[Offer]] = {}
    left = missing
    while left > 0:
        useful = max(1.0, left + expected)
        _, model, count = min(
            (harm / min(slabs, useful), model, count)
            for model, each in offers.items()
            for harm, slabs, count in _prefixes(each[len(taken.get(model, ())) :])
        )
        mine = taken.setdefault(model, [])
        added = offers[model][len(mine) : len(mine) + count]
        mine += added
        left -= sum(offer.slabs for offer in added)
    return _without_spare(taken, -left)


def _prefixes(offers: Sequence[Offer]) -> list[tuple[float, int, int]]:
    """Harm and slabs of the first 1, 2, ... offers together: a dear one may lead to cheap ones."""
    result, harm, slabs = [], 0.0, 0
    for count, offer in enumerate(offers, start=1):
        harm += offer.harm
        slabs += offer.slabs
        if slabs:
            result.append((harm, slabs, count))
    return result


def _without_spare(taken: dict[ModelId, list[Offer]], spare: int) -> dict[ModelId, list[Offer]]:
    """Give back last offers that do more harm than they are needed for, the most harmful first."""
    while spare > 0:
        last = [(each[-1].harm, model) for model, each in taken.items() if each and each[-1].slabs <= spare]
        if not last or (worst := max(last))[0] <= 0.0:
            break
        spare -= taken[worst[1]].pop().slabs
    return {model: each for model, each in taken.items() if each}


def _decisions(holding: Holding, taken: Sequence[Offer], need: Need) -> tuple[ReclaimDecision, ...]:
    """What carries out the offers of one model."""
    model = holding.model
    if taken[-1].part is Part.WEIGHTS:
        return (EvictModel(model),)
    count = sum(offer.num_sequences for offer in taken)
    preempt = (Preempt(model, count),) if count else ()
    if model == need.model:
        blocks = min(holding.num_cached_blocks, need.blocks)
        return (*preempt, DropOwnCache(model, blocks)) if blocks else preempt
    return (*preempt, TakeSlabs(model, min(need.slabs, sum(offer.slabs for offer in taken))))
