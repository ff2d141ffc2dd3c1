"""Numbers arrive as they were given, each group aligned."""

from __future__ import annotations

import pytest
import torch

from prism.engine.gpu.staging import Staging


def test_groups_arrive_aligned() -> None:
    target = torch.zeros(64, dtype=torch.int32)
    staging = Staging(torch.zeros(64, dtype=torch.int32), target)
    ints = staging.ints([7, -1, 5])
    doubles = staging.doubles([0.1, 1 - 2**-53])
    floats = staging.floats([0.25])
    nothing = staging.ints([])
    last = staging.ints([3])
    words = staging.send()
    assert words[ints].tolist() == [7, -1, 5]
    assert words[doubles].view(torch.float64).tolist() == [0.1, 1 - 2**-53]
    assert words[floats].view(torch.float32).tolist() == [0.25]
    assert words[nothing].tolist() == [] and words[last].tolist() == [3]
    assert all(place.start % 4 == 0 for place in (ints, doubles, floats, last))


def test_too_much_is_noticed() -> None:
    staging = Staging(torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32))
    staging.ints([1] * 7)
    staging.ints([])
    with pytest.raises(AssertionError, match="staging area"):
        staging.ints([1])
