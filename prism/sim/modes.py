"""What the four ways to share devices differ in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every device; the server's defaults."""

    slab_bytes: int = 32 << 20
    num_lanes: int = 2
    max_batch_tokens: int = 2048
    max_batch_size: int = 256
    max_wait: float = 60.0
    request_timeout: float = 600.0
    min_residency: float = 2.0
    horizon: float = 0.1
    """Seconds of prompts that engines may hold when requests go by deadlines."""
    quantum: float = 10.0
    """Seconds that a model may take requests in `timeshare` while others wait."""
    is_stepping: bool = False
    """Step one by one instead of many at once; the results are the same."""
