"""Random numbers that depend on (seed, choice, position) only, whatever the batch, device or attempt."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: SplitMix64 (Steele, Lea, Flood 2014) chained over the three."""
    state = _mix(seed & _MASK)
    state = _mix(state ^ (choice + 1) * _GOLDEN & _MASK)
    state = _mix(state ^ (position + 1) * _GOLDEN & _MASK)
    return (state >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
