"""Brings a step's numbers to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 4
"""Words."""


def aligned(num_words: int) -> int:
    """What so many words take: Triton compiles kernels anew for pointers that 16 bytes do not divide."""
    return -(-num_words // ALIGNMENT) * ALIGNMENT


class Staging:
    """Collects arrays of 32-bit words in a pinned buffer; `send` copies them behind the stream's work."""

    def __init__(self, pinned: Tensor, target: Tensor) -> None:
        self._pinned = pinned
        self._words = pinned.numpy()
        self._target = target
        self._used = 0

    def ints(self, values: Sequence[int] | NDArray[np.integer[Any]]) -> slice:
        """Append int32 values; returns where they will be on the device."""
        return self._place(values, len(values))

    def floats(self, values: Sequence[float] | NDArray[np.float32]) -> slice:
        """Append fp32 values."""
        return self._place(np.asarray(values, np.float32).view(np.int32), len(values))

    def doubles(self, values: Sequence[float] | NDArray[np.float64]) -> slice:
        """Append fp64 values."""
        return self._place(np.asarray(values, np.float64).view(np.int32), 2 * len(values))

    def rows(self, values: NDArray[np.int32]) -> list[slice]:
        """Append the rows of a matrix `[rows, n]`, each as if it came by itself."""
        num_rows, count = values.shape
        stride, begin = aligned(count), self._used
        self._used += num_rows * stride
        assert self._used <= len(self._words), "a step brings more along than the staging area holds"
        self._words[begin : self._used].reshape(num_rows, stride)[:, :count] = values
        return [slice(start, start + count) for start in range(begin, self._used, stride)] if count else []

    def _place(self, words: Sequence[int] | NDArray[np.integer[Any]], count: int) -> slice:
        """Behind what is there."""
        place = slice(self._used, self._used + count)
        assert place.stop <= len(self._words), "a step brings more along than the staging area holds"
        self._words[place] = words
        self._used += aligned(count)
        return place

    def send(self) -> Tensor:
        """Queue the copy; the words on the device, `[used]` int32."""
        used = min(self._used, len(self._words))
        target = self._target[:used]
        target.copy_(self._pinned[:used], non_blocking=True)
        return target
