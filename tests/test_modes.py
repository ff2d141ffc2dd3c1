"""What modes share."""

from __future__ import annotations

import pytest

from prism.modes import kv_shares


@pytest.mark.parametrize(
    ("spare", "floors", "loads", "shares"),
    [
        (12, [1, 1, 1], [None, None, None], [4, 4, 4]),
        (12, [1, 1, 1], [0.6, None, 0.2], [4, 4, 4]),
        (12, [1, 1, 1], [0.0, 0.0, 0.0], [4, 4, 4]),
        (11, [1, 1, 1], [0.75, 0.25, 0.0], [7, 3, 1]),
        (12, [5, 1], [1.0, 1.0], [8, 4]),
        (3, [1, 1], [1.0, 3.0], [1, 1]),
    ],
)
def test_parts_of_kv(spare: int, floors: list[int], loads: list[float | None], shares: list[int]) -> None:
    assert kv_shares(spare, floors, loads) == shares and sum(shares) <= spare
