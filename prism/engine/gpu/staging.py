"""Brings a step's numbers to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


class Staging:
    """Collects arrays of 32-bit words in a pinned buffer; `send` copies them behind the stream's work."""

    def __init__(self, pinned: Tensor, target: Tensor) -> None:
        self._pinned = pinned
        self._words = pinned.numpy()
        self._target = target
        self._used = 0

    def ints(self, values: Sequence[int]) -> slice:
        """Append int32 values; returns where they will be on the device."""
        place = slice(self._used, self._used + len(values))
        self._words[place] = values
        self._used = place.stop
        return place

    def floats(self, values: Sequence[float]) -> slice:
        """Append fp32 values."""
        place = slice(self._used, self._used + len(values))
        self._words[place] = np.asarray(values, np.float32).view(np.int32)
        self._used = place.stop
        return place

    def doubles(self, values: Sequence[float]) -> slice:
        """Append fp64 values, aligned to 8 bytes."""
        self._used += self._used % 2
        place = slice(self._used, self._used + 2 * len(values))
        self._words[place] = np.asarray(values, np.float64).view(np.int32)
        self._used = place.stop
        return place

    def send(self) -> Tensor:
        """Queue the copy; the words on the device, `[used]` int32."""
        target = self._target[: self._used]
        target.copy_(self._pinned[: self._used], non_blocking=True)
        return target
