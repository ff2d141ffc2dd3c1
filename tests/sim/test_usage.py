"""Simulated models count what workers count, many steps at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.sim.ticks import PER_SECOND, to_seconds
from prism.sim.usage import Gaps, Series, Usage
from prism.worker.usage import Usage as Counted

ticks = st.integers(1, PER_SECOND // 20)
small = st.integers(0, PER_SECOND // 2000)


@given(ticks, small, st.integers(1, 40), ticks, ticks, small, ticks, st.integers(1, 2))
def test_many_steps_count_as_one_by_one(
    first: int, growth: int, count: int, gap: int, next_gap: int, slower: int, tpot: int, width: int
) -> None:
    usage, counted = Usage(tpot), Counted()
    gaps = Gaps(gap, Series(next_gap, slower, count - 1))
    usage.ran_decodes(Series(first, growth, count), gaps, width)
    end = 0
    for step in range(count):
        end += gap if step == 0 else next_gap + (step - 1) * slower
        length = to_seconds(first + step * growth)
        counted.ran(length / width, length, to_seconds(end), to_seconds(tpot))
    assert usage.device_seconds == pytest.approx(counted.device_seconds)
    assert usage.needed_seconds == pytest.approx(counted.needed_seconds)
    assert usage.blocked_seconds == pytest.approx(counted.blocked_seconds, abs=1e-9)


def test_prompts_and_streams_that_others_wait_for_are_needed_in_full() -> None:
    usage = Usage(PER_SECOND)
    usage.ran_prompts(PER_SECOND // 10)
    usage.ran_decodes(Series(PER_SECOND // 10, 0, 3), None, 2)
    assert usage.needed_seconds == usage.device_seconds == pytest.approx(0.25)
