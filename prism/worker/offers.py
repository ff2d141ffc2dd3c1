"""What each model of a device could give up, in which order, and what each part of it costs. Pure.

A cost is in seconds of *harm*: the time that it takes to have again what was given up, times the probability
that it is needed soon (foresight.py). For what is needed for certain, sequences that run, the time by which
their next tokens come late is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from prism.worker.snapshot import Holding, MemorySnapshot, Need, Running

PARTS = 16
"""Of a need, that sequences are offered in: fewer offers are quicker to choose from."""


class Part(StrEnum):
    """Of what a model holds, in the order in which it gives it up."""

    EMPTY = "empty"
    CACHE = "cache"
    SEQUENCES = "sequences"
    WEIGHTS = "weights"
    """And with them all that is left."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The next part of what a model could give up; what comes before in the same list goes first."""

    part: Part
    slabs: int
    """More than those before; in the case of the needy model itself, as good as so many slabs."""
    harm: float
    """Seconds."""
    num_sequences: int = 0
    is_missed: bool = False
    """It is asked back at once: who takes it moves the need, and more of it than is missing is of no use."""


def offers_of(other: Holding, need: Need, snapshot: MemorySnapshot, now: float) -> list[Offer]:
    """Of a model that is not the needy one, and active.

    Above its floor: empty slabs, the prefix cache, sequences that are younger than the need from the youngest
    on. Then all of it: an idle model's weights, or those of one whose requests are all younger than the need
    and which has had them for `min_residency`. Never a pinned one's. A need that may not displace gets no
    more of a model that has requests than empty slabs and cache.
    """
    if not need.may_displace and other.oldest_request is not None:
        return list(_empty_and_cache(other))
    offers = [*_empty_and_cache(other), *_sequences(other, need)]
    given = sum(offer.slabs for offer in offers)
    if not other.is_pinned and _may_leave(other, need, snapshot.min_residency, now):
        offers.append(_everything(other, given))
    return offers


def _empty_and_cache(other: Holding) -> Iterator[Offer]:
    spare = max(0, other.kv_slabs - other.kv_floor)
    empty = min(spare, other.empty_slabs)
    if empty:
        yield Offer(Part.EMPTY, empty, 0.0)
    cached = min(spare, other.gatherable_slabs) - empty
    if cached > 0:
        blocks = min(other.num_cached_blocks, cached * other.blocks_per_slab)
        yield Offer(Part.CACHE, cached, blocks * other.block_seconds * other.reuse_chance)


def _sequences(other: Holding, need: Need) -> Iterator[Offer]:
    """Each offer frees a slab at least: blocks of several sequences may be needed for that."""
    spare = other.kv_slabs - other.kv_floor - other.gatherable_slabs
    step = max(1, need.slabs // PARTS)
    blocks = other.num_free_blocks + other.num_cached_blocks - other.gatherable_slabs * other.blocks_per_slab
    harm, count = 0.0, 0
    for sequence in younger(other, need):
        blocks += sequence.num_blocks
        harm += harm_of(sequence)
        count += 1
        gained = min(spare, blocks // other.blocks_per_slab)
        if gained >= step:
            yield Offer(Part.SEQUENCES, gained, harm, count, is_missed=True)
            spare -= gained
            blocks -= gained * other.blocks_per_slab
            harm, count = 0.0, 0
        if spare <= 0:
            return
    if count and (gained := min(spare, blocks // other.blocks_per_slab)) > 0:
        yield Offer(Part.SEQUENCES, gained, harm, count, is_missed=True)


def younger(holding: Holding, need: Need) -> Iterator[Running]:
    """Sequences that give way to a need, the youngest first."""
    for sequence in reversed(holding.running):
        if sequence.rank <= need.rank:
            return
        yield sequence


def harm_of(sequence: Running) -> float:
    """It has to be brought back, and its next token is late by what its slack does not cover."""
    return sequence.seconds + max(0.0, sequence.seconds - max(0.0, sequence.slack))


def _may_leave(other: Holding, need: Need, min_residency: float, now: float) -> bool:
    if other.oldest_request is None:
        return True
    return other.oldest_request > need.rank and now - other.active_since >= min_residency


def _everything(other: Holding, given: int) -> Offer:
    """Who has requests is loaded again at once, and they wait for it."""
    chance = other.return_chance if other.oldest_request is None else 2.0
    left = other.kv_slabs - min(given, other.kv_slabs)
    cached = min(other.num_cached_blocks, left * other.blocks_per_slab)
    harm = other.load_seconds * chance + cached * other.block_seconds * other.reuse_chance
    return Offer(Part.WEIGHTS, other.weight_slabs + left, harm, is_missed=other.oldest_request is not None)


def own_offers(own: Holding, need: Need) -> list[Offer]:
    """Of the needy model itself: blocks that it can use without getting a slab for them."""
    offers = []
    blocks = own_cache(own, need)
    slabs = _worth(blocks, own, need)
    if slabs:
        offers.append(Offer(Part.CACHE, slabs, blocks * own.block_seconds * own.reuse_chance))
    harm, count = 0.0, 0
    for sequence in younger(own, need):
        if slabs >= need.slabs:
            break
        blocks += sequence.num_blocks
        harm += harm_of(sequence)
        count += 1
        if (gained := _worth(blocks, own, need) - slabs) > 0:
            offers.append(Offer(Part.SEQUENCES, gained, harm, count, is_missed=True))
            slabs += gained
            harm, count = 0.0, 0
    return offers


def own_cache(own: Holding, need: Need) -> int:
    """Cached blocks of the needy model that can be used for others, as many as are needed."""
    return max(0, min(own.num_cached_blocks - need.num_found, need.blocks))


def _worth(blocks: int, own: Holding, need: Need) -> int:
    """Slabs that so many blocks stand for."""
    return need.slabs if blocks >= need.blocks else min(need.slabs, blocks // own.blocks_per_slab)
