"""Virtual time: whole picoseconds, so that many steps at once end exactly when one after the other would."""

from __future__ import annotations

PER_SECOND = 10**12
NEVER = 1 << 80
"""Later than everything."""


def to_ticks(seconds: float) -> int:
    """The nearest tick."""
    return round(seconds * PER_SECOND)


def to_seconds(ticks: int) -> float:
    """What policies and reports see."""
    return ticks / PER_SECOND
