"""Rows of a matrix as fp8 (e4m3) with one scale each: `row = scale * fp8`, `scale = max |row| / 448`.

Rounded to nearest, ties to even, as torch and GPUs do, by a table: the upper half of an fp32 number, with its
last bit set if anything of the lower half was, has all that the rounding needs to know.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F8_MAX = 448.0
_BLOCK = 1 << 16
"""Numbers at a time. Temporaries stay in a core's cache: 390 instead of 150 million numbers a second."""


class NotFinite(ValueError):
    """A row has an infinite number or one that is none."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row}")
        self.row = row


class Quantised(NamedTuple):
    """Where rows go."""

    values: NDArray[np.uint8]  # [rows, columns]
    scales: NDArray[np.float32]  # [rows]


def quantise(rows: NDArray[np.float32], target: Quantised) -> None:
    """Quantise `rows [rows, columns]`. A row of zeros gets the scale 1. Raises `NotFinite`."""
    step = max(1, _BLOCK // max(1, rows.shape[1]))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        scales = scales_of(rows[part], first)
        target.scales[part] = scales
        target.values[part] = to_f8(rows[part] / scales[:, None])


def scales_of(rows: NDArray[np.float32], first: int = 0) -> NDArray[np.float32]:
    """A scale for each row, never smaller than the least normal number."""
    peaks = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    if not np.isfinite(peaks).all():
        raise NotFinite(first + int(np.argmin(np.isfinite(peaks))))
    scales: NDArray[np.float32] = np.maximum(peaks / np.float32(F8_MAX), np.finfo(np.float32).tiny)
    scales[peaks == 0] = 1
    return scales


def to_f8(numbers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The bits of e4m3; numbers beyond 448 become 448."""
    bits = numbers.view(np.uint32)
    index = bits & 0xFFFF
    index += 0xFFFF  # carries into bit 16 unless the lower half is zero
    index |= bits
    index >>= 16
    result: NDArray[np.uint8] = _table().take(index)
    return result


@cache
def _table() -> NDArray[np.uint8]:
    """The nearest e4m3 of each upper half; the bits of positive ones are in the order of their values."""
    finite = np.minimum(np.arange(1 << 15, dtype=np.uint32), 0x7F7F)
    magnitudes = (finite << 16).view(np.float32).astype(np.float64)
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    middles = (values[1:] + values[:-1]) / 2
    below = np.searchsorted(middles, magnitudes, side="left")
    above = np.searchsorted(middles, magnitudes, side="right")  # one more where the number is a middle: a tie
    positive = np.where(below % 2 == 0, below, above).astype(np.uint8)
    return np.concatenate([positive, positive | 0x80])
