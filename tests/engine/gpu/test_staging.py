"""Numbers arrive as they were given, each group aligned."""

from __future__ import annotations

import numpy as np
import pytest

from prism.engine.gpu.staging import Staging


def test_groups_arrive_aligned() -> None:
    words = np.full(64, 9, np.int32)
    staging = Staging(words)
    ints = staging.ints([7, -1, 5])
    staging.doubles([0.1, 1 - 2**-53], 3)
    nothing = staging.ints([])
    last = staging.ints([3])
    assert words[ints].tolist() == [7, -1, 5]
    assert words[4:8].view(np.float64).tolist() == [0.1, 1 - 2**-53]
    assert words[nothing].tolist() == [] and words[last].tolist() == [3]
    assert (ints.start, last.start, staging.num_words) == (0, 12, 16), "room for three numbers"


def test_room_is_part_of_the_words() -> None:
    words = np.zeros(16, np.int32)
    staging = Staging(words)
    staging.ints([1])
    staging.room(3)[:] = 5
    assert words.tolist()[:8] == [1, 0, 0, 0, 5, 5, 5, 0] and staging.num_words == 8
    with pytest.raises(AssertionError, match="staging area"):
        staging.room(9)


def test_too_much_is_noticed() -> None:
    staging = Staging(np.zeros(8, np.int32))
    staging.ints([1] * 7)
    staging.ints([])
    with pytest.raises(AssertionError, match="staging area"):
        staging.ints([1])
