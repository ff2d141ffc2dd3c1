"""Random numbers that depend on (seed, choice, position) only, whatever the batch, device or attempt.

SplitMix64 (Steele, Lea, Flood 2014) chained over the three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = Sequence[int] | NDArray[np.integer[Any]]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ONE, _STEP, _M0, _M1 = map(np.uint64, (1, _GOLDEN, *_MULTIPLIERS))
_SHIFTS = tuple(map(np.uint64, (30, 27, 31, 11)))


def stream(seed: int, choice: int) -> int:
    """What seed and choice contribute to all of their numbers; 64 bits."""
    return _mix(_mix(seed & _MASK) ^ (choice + 1) * _GOLDEN & _MASK)


def uniforms(streams: Numbers, positions: Numbers) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each; one by one a large batch would take a millisecond."""
    first, second, third, last = _SHIFTS
    value = (np.asarray(positions, np.uint64) + _ONE) * _STEP  # modulo 2^64
    value = (np.asarray(streams, np.uint64) ^ value) + _STEP
    value = (value ^ value >> first) * _M0
    value = (value ^ value >> second) * _M1
    value ^= value >> third
    return (value >> last).astype(np.float64) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ value >> 27) * _MULTIPLIERS[1]) & _MASK
    return value ^ value >> 31
