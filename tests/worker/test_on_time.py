"""Moore and Hodgson's algorithm against brute force."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from prism.worker.on_time import Job, select

jobs = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.just(0)), max_size=9)
jobs_that_load = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12), st.integers(0, 20)), max_size=9)


def is_feasible(some: list[Job], start: float) -> bool:
    end = start
    for deadline, seconds, ready in sorted(some):
        end += seconds
        if end > deadline or ready + seconds > deadline:
            return False
    return True


@given(jobs, st.integers(0, 10))
def test_no_larger_set_ends_in_time(given_jobs: list[Job], start: int) -> None:
    selection = select(given_jobs, start)
    chosen = [given_jobs[i] for i in selection.on_time]
    assert is_feasible(chosen, start)
    for size in range(len(chosen) + 1, len(given_jobs) + 1):
        assert not any(is_feasible(list(some), start) for some in combinations(given_jobs, size))


@given(jobs_that_load, st.integers(0, 10))
def test_everybody_is_either_in_time_or_late(given_jobs: list[Job], start: int) -> None:
    on_time, late = select(given_jobs, start)
    assert sorted([*on_time, *late]) == list(range(len(given_jobs)))
    assert late == sorted(late)
    chosen = [given_jobs[i] for i in on_time]
    assert chosen == sorted(chosen) and is_feasible(chosen, start)


def test_the_longest_gives_way() -> None:
    given_jobs: list[Job] = [(10, 8, 0), (11, 3, 0), (12, 3, 0)]
    assert select(given_jobs, 0) == ([1, 2], [0])


def test_what_loads_too_long_makes_nobody_else_late() -> None:
    given_jobs: list[Job] = [(5, 1, 20), (3, 3, 0)]
    assert select(given_jobs, 0) == ([1], [0])
