"""Number formats by arithmetic on bits: numpy has no bfloat16, and a packer has no time to import torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism.types import DType

_STORAGE: dict[DType, np.dtype[Any]] = {
    DType.BF16: np.dtype("<u2"),
    DType.F16: np.dtype("<f2"),
    DType.F32: np.dtype("<f4"),
}


def storage_dtype(dtype: DType) -> np.dtype[Any]:
    """The numpy type that holds numbers of this format; bfloat16 is held as its bits."""
    return _STORAGE[dtype]


def convert(numbers: NDArray[np.generic], source: DType, target: DType) -> NDArray[np.generic]:
    """Numbers of one format in another, rounded to nearest, ties to even; too large ones become infinite."""
    if source is target:
        return numbers
    wide = _from_bf16(numbers) if source is DType.BF16 else numbers.astype(np.float32)
    if target is DType.BF16:
        return _to_bf16(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow: NDArray[np.generic] = wide.astype(_STORAGE[target], copy=False)
        return narrow


def _from_bf16(bits: NDArray[np.generic]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Adding 0x7FFF, and one more to an odd upper half, carries exactly when rounding goes up."""
    bits = numbers.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) | 0x0040).astype(np.uint16)
    return np.where(np.isnan(numbers), quiet_nan, rounded)
