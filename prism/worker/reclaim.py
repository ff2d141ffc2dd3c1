"""Where slabs come from when a model needs more of them. Pure.

Two rules. **Who may take**: work that runs gives way only to older requests, by a rank that no two sequences
share, and a need has the rank of the very sequence that lacks memory. So the oldest one of a device always
gets what it needs, and no two can take memory from each other in turns. For a model's weights it gives way
only once the model's oldest request has waited in proportion to what loads cost (`patience`): else a device
that is asked for more models than it holds loads them in turns and does little else. **Who gives**: of what
may be taken the cheapest that suffices, across all models and all kinds of memory (offers.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prism.types import ModelId
from prism.worker.offers import Offer, Part, offers_of, own_cache, own_offers, younger
from prism.worker.snapshot import Holding, MemorySnapshot, Need

DISPLACING_SHARE = 0.1
"""Of the time, that loads may take for which others are stopped."""
MOST_PATIENCE = 30.0
"""Seconds."""
CACHE_SHARE = 8
"""A model drops no more than one part in so many of its own cache beyond what is needed."""
WAIT_SHARE = 0.5
"""Of `limits.max_wait`, after which others are stopped in any case: the rest is for the load."""


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


def patience(load_seconds: float, max_wait: float) -> float:
    """Seconds that a model's oldest request waits before others are stopped so that the model can be loaded.

    What is stopped for it is loaded again later, as many bytes: so it costs twice `load_seconds`.
    """
    return min(MOST_PATIENCE, WAIT_SHARE * max_wait, 2 * load_seconds / DISPLACING_SHARE)


ReclaimDecision = TakeSlabs | DropOwnCache | Preempt | EvictModel | CancelLoad


def decide(snapshot: MemorySnapshot, need: Need, now: float) -> tuple[ReclaimDecision, ...]:
    """What to take for `need`; nothing if the slabs are on their way, or nobody can or must give.

    1. Beyond its KV limit a model only takes from itself: its cache, then its younger sequences. Nothing, if
       that does not suffice for a sequence that begins again.
    2. Slabs that are retiring are awaited.
    3. Loads that nobody waits for any more are called off.
    4. The cheapest offers that suffice together.
    5. If all offers together do not: weights take nothing, since a part of them is of no use, nor does a
       sequence that begins again with all that it had; other KV takes what there is, since each block lets a
       sequence go on.
    6. While older requests wait for slabs, KV gets none of others: its model's own offers are left to it.
    7. Evictions come last: they wait for queued steps, which may end what others were to give up.
    """
    own = next((h for h in snapshot.holdings if h.model == need.model), None)
    if own is not None and (beyond := _beyond_limit(own, need)):  # 1
        return _recycled(own, need, beyond)
    missing = need.slabs - snapshot.num_retiring + (need.reserved if need.for_weights else 0)
    if need.slabs + need.reserved <= snapshot.num_retiring:  # 2
        return ()
    if snapshot.unwanted_loads:  # 3
        return tuple(CancelLoad(model) for model in snapshot.unwanted_loads)
    offers = _offers(snapshot, need, own, now)
    most = sum(offer.slabs for each in offers.values() for offer in each)
    is_whole = need.for_weights or need.is_again
    if most < (missing if is_whole else 1):  # 5
        return ()
    taken = _cheapest(offers, min(missing, most), snapshot.expected_demand)  # 4
    holdings = {h.model: h for h in snapshot.holdings}
    decisions = [
        decision
        for model, part in taken.items()
        for decision in _decisions(holdings[model], part, need, missing)
    ]
    return tuple(sorted(decisions, key=lambda decision: isinstance(decision, EvictModel)))  # 7


def is_blocked(snapshot: MemorySnapshot, need: Need, now: float) -> bool:
    """Whether older requests hold what weights lack, so that these have to wait until some of them end.

    As long as they are, sequences of models that are here may have the memory: they give way as soon as these
    can come, so nobody waits for them.
    """
    settled = replace(snapshot, min_residency=0.0)
    slabs = snapshot.num_retiring
    for each in snapshot.holdings:
        if each.model == need.model:
            continue
        if each.is_active:
            slabs += sum(offer.slabs for offer in offers_of(each, need, settled, now))
        elif each.oldest_request is None or each.oldest_request > need.rank:  # on its way in or out
            slabs += each.weight_slabs + each.kv_slabs
    return slabs < need.slabs + need.reserved


def _offers(
    snapshot: MemorySnapshot, need: Need, own: Holding | None, now: float
) -> dict[ModelId, list[Offer]]:
    offers = {}
    if own is not None and not need.for_weights:
        offers[own.model] = own_offers(own, need)
    if need.for_weights or not need.reserved:  # 6
        others = [h for h in snapshot.holdings if h.model != need.model and h.is_active]
        offers |= {other.model: offers_of(other, need, snapshot, now) for other in others}
    return offers


def _beyond_limit(own: Holding, need: Need) -> int:
    """Blocks of a need that a model's KV limit has no room for: all at the limit, before it only those of who
    wants all or nothing."""
    if own.kv_limit is None or need.for_weights:
        return 0
    room = max(0, own.kv_limit - own.kv_slabs) * own.blocks_per_slab
    return need.blocks if not room else max(0, need.blocks - room) if need.is_again else 0


def _recycled(own: Holding, need: Need, beyond: int) -> tuple[ReclaimDecision, ...]:
    """What makes up for the blocks `beyond` the limit."""
    cached, younger_ones = min(own_cache(own, need), beyond), list(younger(own, need))
    if need.is_again and cached + sum(each.num_blocks for each in younger_ones) < beyond:
        return ()
    if cached:
        return (DropOwnCache(own.model, _worth_a_look(own, need, cached)),)
    count = blocks = 0
    for sequence in younger_ones:
        if blocks >= beyond:
            break
        blocks += sequence.num_blocks
        count += 1
    return (Preempt(own.model, count),) if count else ()


def _worth_a_look(own: Holding, need: Need, blocks: int) -> int:
    """How many blocks of its own cache a model drops that needs so many: more, if they are a small part.

    Whoever is at its limit wants one for every sixteenth token of each of its streams, and to look at what
    everybody has for each of them takes longer than all else that is done for a step.
    """
    can_go = own.num_cached_blocks - need.num_found
    return max(blocks, min(can_go, own.blocks_per_slab, own.num_cached_blocks // CACHE_SHARE))


def _cheapest(
    offers: Mapping[ModelId, Sequence[Offer]], missing: int, expected: float
) -> dict[ModelId, list[Offer]]:
    """Greedily by harm per slab, first what nobody asks back at once; then without what was not necessary.

    An offer of more slabs than are missing counts with those that are expected to be asked for soon beside
    them: a whole model is not dropped for one block, unless blocks are wanted all the time.
    """
    taken: dict[ModelId, list[Offer]] = {}
    left = missing
    while left > 0:
        _, model, count = min(
            (price, model, count)
            for model, each in offers.items()
            for price, count in _prices(each[len(taken.get(model, ())) :], left, expected)
        )
        mine = taken.setdefault(model, [])
        added = offers[model][len(mine) : len(mine) + count]
        mine += added
        left -= sum(offer.slabs for offer in added)
    return _without_spare(taken, -left)


class _Price(NamedTuple):
    """What the first offers of a model cost together; less is better, field by field."""

    is_missed: bool
    harm_per_slab: float
    has_weights: bool
    """At equal prices those without weights come first: whatever is believed, there may be less to lose."""


def _prices(offers: Sequence[Offer], missing: int, expected: float) -> Iterator[tuple[_Price, int]]:
    """Of the first 1, 2, ... offers together: a dear one may lead to cheap ones."""
    harm, slabs = 0.0, 0
    for count, offer in enumerate(offers, start=1):
        harm += offer.harm
        slabs += offer.slabs
        if slabs:
            useful = missing if offer.is_missed else max(1.0, missing + expected)
            price = _Price(offer.is_missed, harm / min(slabs, useful), offer.part is Part.WEIGHTS)
            yield price, count


def _without_spare(taken: dict[ModelId, list[Offer]], spare: int) -> dict[ModelId, list[Offer]]:
    """Give back last offers without which the others suffice, the most harmful first."""
    while spare > 0:
        last = [(each[-1].harm, model) for model, each in taken.items() if each and each[-1].slabs <= spare]
        if not last:
            break
        spare -= taken[max(last)[1]].pop().slabs
    return {model: each for model, each in taken.items() if each}


def _decisions(
    holding: Holding, taken: Sequence[Offer], need: Need, missing: int
) -> tuple[ReclaimDecision, ...]:
    """What carries out the offers of one model."""
    model = holding.model
    if taken[-1].part is Part.WEIGHTS:
        return (EvictModel(model),)
    count = sum(offer.num_sequences for offer in taken)
    preempt = (Preempt(model, count),) if count else ()
    if model == need.model:
        blocks = own_cache(holding, need)
        if blocks:
            return (*preempt, DropOwnCache(model, _worth_a_look(holding, need, blocks)))
        return preempt
    return (*preempt, TakeSlabs(model, min(missing, sum(offer.slabs for offer in taken))))
