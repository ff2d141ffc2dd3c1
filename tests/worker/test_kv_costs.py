"""Blocks are moved when that is quicker than computing them again."""

from __future__ import annotations

import pytest

from prism.costs import StepCosts
from prism.types import Bytes, Seconds
from prism.worker.kv_costs import (
    Average,
    block_costs,
    compute_seconds,
    is_worth_fetching,
    is_worth_saving,
)

BLOCK = Bytes(2 << 20)


def decisions(prefill: float, saving: float, fetching: float) -> tuple[bool, bool]:
    costs = block_costs(BLOCK, Seconds(16 / prefill), saving=saving, fetching=fetching)
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


def test_a_blocks_part_of_a_step_is_that_of_a_long_prompt() -> None:
    """A step of 48 tokens took three times as long a token as one of 500, and blocks were worth as much more:
    a whole model was evicted for one slab, where a neighbour had seven cached blocks in one."""
    steps = StepCosts(((1, 0.005), (64, 0.012), (1024, 0.108)), 0.0, 0.0)
    assert compute_seconds(steps, 16) == pytest.approx(16 * 0.108 / 1024)


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
