"""Blocks are moved when that is quicker than computing them again."""

from __future__ import annotations

import pytest

from prism.types import Bytes
from prism.worker.kv_costs import Average, block_costs, is_worth_fetching, is_worth_saving

BLOCK = Bytes(2 << 20)


def decisions(prefill: float, saving: float, fetching: float) -> tuple[bool, bool]:
    costs = block_costs(BLOCK, 16, prefill=prefill, saving=saving, fetching=fetching)
    return is_worth_saving(costs), is_worth_fetching(costs)


@pytest.mark.parametrize(
    ("prefill", "saving", "fetching", "expected"),
    [
        (40_000, 50e9, 50e9, (True, True)),  # an 8B model on an H200: 0.4 ms, or 0.04 ms each way
        (40_000, 8e9, 8e9, (False, True)),  # both ways take longer, the way back alone does not
        (40_000, 50e9, 4e9, (False, False)),
        (4_000_000, 50e9, 50e9, (False, False)),
    ],
)
def test_decisions(prefill: float, saving: float, fetching: float, expected: tuple[bool, bool]) -> None:
    assert decisions(prefill, saving, fetching) == expected


def test_a_guess_gives_way_to_what_is_measured() -> None:
    speed = Average(100.0)
    speed.add(10, 0.0)
    speed.add(0, 1.0)
    assert speed.value == 100.0
    speed.add(10, 1.0)
    assert speed.value == 10.0
    speed.add(20, 1.0)
    assert 10.0 < speed.value < 20.0
    for _ in range(60):
        speed.add(20, 1.0)
    assert speed.value == pytest.approx(20.0, rel=1e-3)
