"""Which model comes back into free memory before anybody asks for it. Pure.

Memory that nobody uses is worth nothing, and a first token that waits for a load is late. What is loaded
ahead reserves nothing in placement, and whoever lacks memory calls its load off or evicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prism.types import ModelId

SPARE = 1 / 4
"""Share of a device that stays free for KV: what has come ahead would only be evicted for it."""


class Absent(NamedTuple):
    """A model that lives here and is not in memory."""

    model: ModelId
    slabs: int
    """That it takes when it is loaded."""
    return_chance: float
    """That somebody asks for it soon."""


def room(num_free: int, num_slabs: int, expected_demand: float) -> float:
    """Slabs that may be filled; there may be none.

    `expected_demand` are those that are going to be asked for soon, as far as the recent past tells.
    """
    return num_free - max(num_slabs * SPARE, expected_demand)


def choose(absent: Sequence[Absent], num_free: int, num_slabs: int, expected_demand: float) -> ModelId | None:
    """The likeliest of those for which there is room; of equals the smallest.

    To be asked only while nothing is loaded and nobody waits for memory.
    """
    most = room(num_free, num_slabs, expected_demand)
    fitting = [each for each in absent if each.slabs <= most]
    best = min(fitting, key=lambda each: (-each.return_chance, each.slabs, each.model), default=None)
    return None if best is None else best.model
