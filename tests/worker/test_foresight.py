from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.worker.foresight import (
    HORIZON,
    TYPICAL_OUTPUT,
    CacheHits,
    IdleTimes,
    OutputLengths,
    RecentDemand,
    UseTimes,
    reuse_chance,
)


def test_the_longer_a_block_was_not_used_the_less_it_is_worth() -> None:
    chances = [reuse_chance(age) for age in (0, 1, 10, 100, 1000)]
    assert chances == sorted(chances, reverse=True)
    assert chances[0] == pytest.approx(0.5) and chances[-1] < 0.01


def test_a_model_that_comes_back_every_minute_is_worth_most_then() -> None:
    """A constant threshold would drop it after 45 s, a quarter of a minute before it returns."""
    times = IdleTimes()
    before = times.return_chance(50.0)
    for _ in range(20):
        times.add(58.0)
    assert times.return_chance(50.0) > 2 * before
    assert times.return_chance(50.0) > 3 * times.return_chance(10.0)
    assert times.return_chance(300.0) < 0.1, "it does not come any more"


def test_a_change_of_habit_is_learnt() -> None:
    times = IdleTimes()
    for _ in range(50):
        times.add(600.0)
    rare = times.return_chance(1.0)
    for _ in range(20):
        times.add(2.0)
    assert rare < 0.1 < 0.5 < times.return_chance(1.0)


def test_the_published_threshold() -> None:
    times = IdleTimes()
    times.add(1.0)
    assert [times.return_chance(age, 45.0) for age in (0.0, 44.9, 45.0)] == [1.0, 1.0, 0.0]


@given(gaps=st.lists(st.floats(0, 1e6)), age=st.floats(0, 1e6))
def test_chances_are_probabilities(gaps: list[float], age: float) -> None:
    times = IdleTimes()
    for gap in gaps:
        times.add(gap)
    assert 0.0 <= times.return_chance(age) <= 1.0


def test_serial_numbers_tell_ages() -> None:
    times = UseTimes()
    for second in range(100):
        times.saw(10 * second, float(second))
    assert times.age(500, now=100.0) == 50.0
    assert times.age(495, now=100.0) == 50.0, "it was given out within that second"
    assert times.age(1000, now=100.0) == 0.0, "since the last look"
    assert UseTimes().age(5, now=1.0) == 0.0


def test_the_last_uses_before_a_rest_grow_old() -> None:
    """Those within a second of a reading counted as of just now until the model ran again, hours later."""
    times = UseTimes()
    times.saw(0, 1.0)
    times.saw(5, 1.5)
    assert times.age(3, now=100.0) == 98.5
    assert times.age(6, now=100.0) == 0.0
    times.saw(7, 2.5)
    assert times.age(6, now=100.0) == 97.5


def test_a_long_life_takes_little_memory() -> None:
    times = UseTimes()
    for second in range(100_000):
        times.saw(second, float(second))
    assert sum(map(len, times._levels)) < 1000
    for age in (0, 1, 10, 60, 1000, 20_000, 90_000):
        assert times.age(100_000 - age, 100_000.0) == pytest.approx(age, rel=0.05, abs=2)


def test_demand_fades() -> None:
    demand = RecentDemand()
    demand.add(10, now=5.0)
    demand.add(10, now=5.0)
    assert demand.within_horizon(5.0) == 20.0
    assert demand.within_horizon(5.0 + HORIZON) == pytest.approx(20.0 / 2.718, rel=0.01)


def test_output_lengths_follow_what_is_seen() -> None:
    lengths = OutputLengths()
    assert lengths.expected_rest == TYPICAL_OUTPUT
    for _ in range(100):
        lengths.add(1000)
    assert lengths.expected_rest == pytest.approx(1000, rel=0.02)


def test_a_cache_that_nobody_uses_is_worth_less_and_less() -> None:
    hits = CacheHits()
    assert hits.share == 1.0
    for turn in range(1, 11):
        hits.saw(4096 * turn, 0)
        assert hits.share == pytest.approx(1 / (turn + 1))
    hits.saw(10 * 4096 + 1000, 1000)
    assert hits.share == pytest.approx(5096 / (11 * 4096 + 1000))


def test_what_a_cache_had_long_ago_is_forgotten() -> None:
    hits = CacheHits()
    for turn in range(1, 101):
        hits.saw(100_000 * turn, 100_000 * turn)
    for turn in range(1, 101):
        hits.saw(100_000 * (100 + turn), 10_000_000)
    assert hits.share < 0.01
