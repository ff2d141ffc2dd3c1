"""The four ways to share a device, and what they differ in. Policies of one server, not forks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from prism.types import MiB


class Mode(StrEnum):
    """A way to share devices."""

    STATIC = "static"
    ELASTIC = "elastic"
    TIMESHARE = "timeshare"
    PRISM = "prism"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a mode does."""

    by_deadline: bool
    """Requests, and models' steps, go by deadlines; else requests by arrival and models in turns."""
    is_resident: bool
    """All models of a device keep their weights there, so they must fit together."""
    has_shares: bool
    """Each model has a fixed part of the memory for its KV."""
    is_exclusive: bool
    """One model is on a device at a time."""


RULES = {
    Mode.STATIC: Rules(by_deadline=False, is_resident=True, has_shares=True, is_exclusive=False),
    Mode.ELASTIC: Rules(by_deadline=False, is_resident=True, has_shares=False, is_exclusive=False),
    Mode.TIMESHARE: Rules(by_deadline=False, is_resident=False, has_shares=False, is_exclusive=True),
    Mode.PRISM: Rules(by_deadline=True, is_resident=False, has_shares=False, is_exclusive=False),
}


LEAST_KV = 512 * MiB


def least_kv(num_slabs: int, slab_bytes: int) -> int:
    """Slabs of KV without which no model stays on a device: 512 MiB, on a small one a 64th of its memory."""
    return max(1, min(LEAST_KV // slab_bytes, num_slabs // 64))


def kv_shares(spare: int, floors: Sequence[int], loads: Sequence[float | None]) -> list[int]:
    """Slabs of KV of each model of a device in `static`: its floor, and of the rest a part by its load.

    Loads are those that are expected, in any unit. Parts are even where one is unknown, or all are 0.
    """
    rest = spare - sum(floors)
    known = [load for load in loads if load is not None]
    if len(known) < len(loads) or not sum(known):
        known = [1.0] * len(loads)
    return [floor + int(rest * load / sum(known)) for floor, load in zip(floors, known, strict=True)]
