"""Collects a step's numbers, which come to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4
"""Words."""


def aligned(num_words: int) -> int:
    """What so many words take: Triton compiles kernels anew for pointers that 16 bytes do not divide."""
    return -(-num_words // ALIGNMENT) * ALIGNMENT


class Staging:
    """Arrays of 32-bit words, one behind the other in a pinned buffer."""

    def __init__(self, words: NDArray[np.int32]) -> None:
        self._words = words
        self._used = 0

    @property
    def num_words(self) -> int:
        """What has to be copied."""
        return min(self._used, len(self._words))

    def room(self, num_words: int) -> NDArray[np.int32]:
        """The next words, to be written; something is in them."""
        begin = self._used
        assert begin + num_words <= len(self._words), "a step brings more along than the staging area holds"
        self._used += aligned(num_words)
        return self._words[begin : begin + num_words]

    def ints(self, values: Sequence[int] | NDArray[np.integer[Any]]) -> slice:
        """Append int32 values; returns where they will be on the device."""
        begin, count = self._used, len(values)
        self.room(count)[:] = values
        return slice(begin, begin + count)

    def doubles(self, values: Sequence[float] | NDArray[np.float64], room: int) -> None:
        """Append fp64 values where there is room for so many."""
        words = np.asarray(values, np.float64).view(np.int32)
        self.room(2 * room)[: len(words)] = words
