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


def stream(seed: int, choice: int) -> int:
    """What seed and choice contribute to all of their numbers; 64 bits."""
    return _mix(_mix(seed & _MASK) ^ (choice + 1) * _GOLDEN & _MASK)


def uniforms(streams: Numbers, positions: Numbers) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each; one by one a large batch would take a millisecond."""
    value = (np.asarray(positions, np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)  # modulo 2^64
    value = (np.asarray(streams, np.uint64) ^ value) + np.uint64(_GOLDEN)
    value = (value ^ value >> np.uint64(30)) * np.uint64(_MULTIPLIERS[0])
    value = (value ^ value >> np.uint64(27)) * np.uint64(_MULTIPLIERS[1])
    value ^= value >> np.uint64(31)
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ value >> 30) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ value >> 27) * _MULTIPLIERS[1]) & _MASK
    return value ^ value >> 31
