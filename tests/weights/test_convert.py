"""Number formats, compared with torch's: every 16-bit number, and many 32-bit ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prism.types import DType
from prism.weights.convert import convert, storage_dtype

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}
PAIRS = [(source, target) for source in TORCH for target in TORCH]


def samples(dtype: DType) -> NDArray[np.uint8]:
    """Bytes of all 16-bit patterns, or of many 32-bit ones with ties, limits and odd numbers among them."""
    if dtype is not DType.F32:
        return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x0FFF, 0x3000]
    return np.concatenate([upper + low for low in lower]).astype(np.uint32).view(np.uint8)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conversion_equals_torchs(source: DType, target: DType) -> None:
    data = samples(source)
    ours = convert(data.view(storage_dtype(source)), source, target)
    theirs = torch.from_numpy(data.copy()).view(TORCH[source]).to(TORCH[target])
    result = torch.from_numpy(np.ascontiguousarray(ours).view(np.uint8)).view(TORCH[target])
    assert torch.equal(torch.isnan(result), torch.isnan(theirs))
    bits = {2: torch.int16, 4: torch.int32}[target.itemsize]
    numbers = ~torch.isnan(theirs)
    assert torch.equal(result.view(bits)[numbers], theirs.view(bits)[numbers])
