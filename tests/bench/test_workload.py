"""Traffic: rates, shapes, lengths, and who is asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prism.bench.workload import Steady, plan, scaled_rate, steady
from prism.sim.trace import TraceRow, clip
from prism.types import ModelId
from tests.bench.records import target

TRAFFIC = Steady(num_requests=4000, rate=10.0, burstiness=1.0, prompt=100, output=10)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    rows = steady(replace(TRAFFIC, burstiness=burstiness), ["a"], seed=3)
    gaps = np.diff([row.arrival for row in rows])
    assert rows[-1].arrival == pytest.approx(400.0)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_the_same_seed_makes_the_same_requests() -> None:
    assert steady(TRAFFIC, ["a", "b"], 1) == steady(TRAFFIC, ["a", "b"], 1) != steady(TRAFFIC, ["a", "b"], 2)


def test_without_a_rate_all_leave_at_once() -> None:
    rows = steady(replace(TRAFFIC, num_requests=5, rate=float("inf")), ["a"], 0)
    assert [row.arrival for row in rows] == [0.0] * 5


def test_lengths_are_within_their_range() -> None:
    rows = steady(replace(TRAFFIC, spread=0.5), ["a"], 0)
    assert {min(row.prompt for row in rows), max(row.prompt for row in rows)} == {50, 150}
    assert {row.output for row in steady(TRAFFIC, ["a"], 0)} == {10}


def rows(count: int) -> list[TraceRow]:
    return [TraceRow(float(i), ModelId("a"), 10, 10) for i in range(count)]


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_a_scaled_rate_changes_how_many_there_are(factor: float) -> None:
    scaled = scaled_rate(rows(4000), factor, seed=5)
    assert len(scaled) == pytest.approx(factor * 4000, rel=0.05)
    assert scaled == sorted(scaled)
    assert scaled[-1].arrival < 4003
    assert scaled == scaled_rate(rows(4000), factor, seed=5)
    if factor == 1.0:
        assert scaled == rows(4000)


def test_a_plan_begins_with_the_first_arrival() -> None:
    a, b = target("a"), replace(target("b"), context=100)
    trace = [TraceRow(7.0, ModelId("b"), 90, 40), TraceRow(5.0, ModelId("a"), 9000, 40)]
    first, second = plan(trace, {"a": a, "b": b})
    assert (first.index, first.at, first.target, first.prompt, first.output) == (0, 0.0, a, 9000, 40)
    assert (second.index, second.at, second.target, second.prompt, second.output) == (1, 2.0, b, 60, 40)


@pytest.mark.parametrize(
    ("asked", "given"),
    [((10, 10), (10, 10)), ((90, 20), (80, 20)), ((90, 90), (50, 50)), ((20, 200), (20, 80))],
)
def test_what_is_too_long_is_shortened(asked: tuple[int, int], given: tuple[int, int]) -> None:
    assert clip(*asked, 100) == given


def test_the_shortest_bursts_have_times() -> None:
    """A gap of so small a shape may be zero, and the rate was divided by it."""
    shortest = replace(TRAFFIC, num_requests=1, burstiness=0.01)
    for seed in range(3000):
        (row,) = steady(shortest, ["a"], seed)
        assert 0 <= row.arrival <= 1.01 / TRAFFIC.rate
