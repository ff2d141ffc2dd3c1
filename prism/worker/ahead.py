"""Which model comes back into free memory before anybody asks for it. Pure.

Memory that nobody uses is worth nothing, and what a prefix cache keeps may be worth little; a first token
that waits for a load is late. What is loaded ahead reserves nothing in placement, and whoever lacks memory
calls its load off or evicts it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from prism.types import ModelId

SPARE = 1 / 4
"""Share of a device that stays free for KV: what has come ahead would only be evicted for it."""


WORTH = 0.5
"""Of what a load ahead is expected to save, what prefix caches may lose by it."""


class Cached(NamedTuple):
    """What a model's prefix cache could give."""

    slabs: int
    harm: float
    """Seconds that each of them is expected to cost."""


class Absent(NamedTuple):
    """A model that lives here and is not in memory."""

    model: ModelId
    slabs: int
    """That it takes when it is loaded."""
    return_chance: float
    """That somebody asks for it soon."""
    load_seconds: float = 0.0
    """That it then has to wait for."""

    def may_have(self, cache: Cached) -> bool:
        """It is worth more than what the cache keeps there."""
        return cache.harm * self.slabs < WORTH * self.return_chance * self.load_seconds


def room(num_free: int, num_slabs: int, expected_demand: float) -> float:
    """Slabs that may be filled; there may be none.

    `expected_demand` are those that are going to be asked for soon, as far as the recent past tells.
    """
    return num_free - max(num_slabs * SPARE, expected_demand)


def choose(
    absent: Sequence[Absent],
    num_free: int,
    num_slabs: int,
    expected_demand: float,
    caches: Collection[Cached] = (),
) -> ModelId | None:
    """The likeliest of those for which there is room, or caches that are worth less; of equals the smallest.

    To be asked only while nothing is loaded and nobody waits for memory.
    """

    def fits(each: Absent) -> bool:
        cached = sum(cache.slabs for cache in caches if each.may_have(cache))
        return each.slabs <= room(num_free + cached, num_slabs, expected_demand)

    fitting = [each for each in absent if fits(each)]
    best = min(fitting, key=lambda each: (-each.return_chance, each.slabs, each.model), default=None)
    return None if best is None else best.model
