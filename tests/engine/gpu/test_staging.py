"""Numbers arrive as they were given, each group aligned."""

from __future__ import annotations

import numpy as np
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


def test_rows_arrive_as_if_each_came_by_itself() -> None:
    staging = Staging(torch.full((64,), 9, dtype=torch.int32), torch.zeros(64, dtype=torch.int32))
    before = staging.ints([1])
    first, second = staging.rows(np.array([[1, 2, 3], [4, 5, 6]], np.int32))
    after = staging.ints([7])
    words = staging.send()
    assert [words[place].tolist() for place in (before, first, second, after)] == [
        [1],
        [1, 2, 3],
        [4, 5, 6],
        [7],
    ]
    assert [place.start for place in (first, second, after)] == [4, 8, 12]
    with pytest.raises(AssertionError, match="staging area"):
        staging.rows(np.zeros((13, 4), np.int32))


def test_too_much_is_noticed() -> None:
    staging = Staging(torch.zeros(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32))
    staging.ints([1] * 7)
    staging.ints([])
    with pytest.raises(AssertionError, match="staging area"):
        staging.ints([1])
