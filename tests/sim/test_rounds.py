"""The end of many steps, and how many have run, in closed form."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from prism.sim.decoding import DecodeGroup
from prism.sim.jobs import Job
from prism.sim.rounds import LEAD, Part, Rounds
from prism.sim.runs import _bank
from prism.types import ModelId, RequestId
from prism.worker.foresight import BANKED

parts = st.lists(st.tuples(st.integers(1, 10**10), st.integers(0, 10**6)), min_size=1, max_size=4)


def ends(members: list[tuple[int, int]], start: int, steps: int) -> list[int]:
    """Step by step."""
    times, counts, clock = [], [0] * len(members), start
    for step in range(steps):
        index = step % len(members)
        first, growth = members[index]
        clock += first + counts[index] * growth
        counts[index] += 1
        times.append(clock)
    return times


def rounds(members: list[tuple[int, int]], start: int, steps: int, *, is_ahead: bool = False) -> Rounds[int]:
    parts = [Part(i, first, growth) for i, (first, growth) in enumerate(members)]
    return Rounds(parts, start, steps, is_ahead=is_ahead)


@given(parts, st.integers(0, 10**12), st.integers(1, 50))
def test_ends(members: list[tuple[int, int]], start: int, steps: int) -> None:
    run = rounds(members, start, steps)
    assert [run.end_of(n + 1) for n in range(steps)] == ends(members, start, steps)
    assert run.end == run.end_of(steps)


@given(parts, st.integers(1, 50), st.integers(-5, 5), st.data())
def test_ended_begun_and_cut(
    members: list[tuple[int, int]], steps: int, offset: int, data: st.DataObject
) -> None:
    """Around the very ends of steps too, where a step that would begin has not."""
    times = ends(members, 100, steps)
    now = data.draw(st.sampled_from([100, *times])) + offset
    run = rounds(members, 100, steps)
    ended = sum(time <= now for time in times)
    begun = sum(time < now for time in [100, *times[:-1]])
    assert run.ended_by(now) == ended and run.progress(now) == (ended, max(begun, ended))
    run.account(*run.progress(now))
    run.cut(now)
    assert run.num_steps == max(begun, ended)
    assert run.end == (times[run.num_steps - 1] if run.num_steps else 100)


@given(parts, st.integers(1, 50), st.integers(-5, 5), st.data())
def test_steps_close_shortly_before_they_end(
    members: list[tuple[int, int]], steps: int, offset: int, data: st.DataObject
) -> None:
    """But none before it begins; the next one is chosen then."""
    times = ends(members, 100, steps)
    closes = [max(begin, end - LEAD) for begin, end in pairwise([100, *times])]
    now = data.draw(st.sampled_from(closes)) + offset
    run = rounds(members, 100, steps, is_ahead=True)
    assert [run.closed_at(n + 1) for n in range(steps)] == closes
    closed = sum(time <= now for time in closes)
    begun = sum(time < now for time in [100, *closes[:-1]])
    assert run.progress(now) == (closed, max(begun, closed))
    run.account(*run.progress(now))
    run.cut(now)
    assert run.num_steps == max(begun, closed)
    assert run.closes == (closes[run.num_steps - 1] if run.num_steps else 100)


@given(parts, st.integers(1, 20), st.booleans(), st.data())
def test_nothing_closes_or_begins_while_an_account_stands(
    members: list[tuple[int, int]], steps: int, is_ahead: bool, data: st.DataObject
) -> None:
    """And the first moment at which it does is when it stands no more."""
    run = rounds(members, 100, steps, is_ahead=is_ahead)
    now = 100
    while run.done < steps:
        closed, begun = run.progress(now)
        run.account(closed, max(begun, run.begun))
        then = min(run.stands_until, run.end + 10)
        assert then > now
        between = data.draw(st.integers(now, then - 1))
        closed, begun = run.progress(between)
        assert (closed, max(begun, 1)) == (run.done, run.begun)
        closed, begun = run.progress(then)
        assert run.done == steps or (closed, max(begun, 1)) > (run.done, run.begun)
        now = then


def test_members_take_turns() -> None:
    run = rounds([(10, 0), (20, 0), (30, 0)], 0, 7)
    assert [run.steps_of(i, 7) for i in range(3)] == [3, 2, 2]
    assert [run.last_of(i, 7) for i in range(3)] == [6, 4, 5]


@given(
    first=st.integers(1, 200),
    growth=st.integers(0, 20),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    ahead=st.integers(-2000, 800),
    idle=st.integers(0, 500),
)
def test_what_streams_are_ahead_is_the_same_at_once_and_step_by_step(
    first: int, growth: int, counts: list[int], ahead: int, idle: int
) -> None:
    """Of a member of rounds of two, however the steps are put together."""
    group = DecodeGroup(16)
    group.join(Job(RequestId("r"), ModelId("m"), 0, 10, 10_000, 0), ahead)
    at_once = SimpleNamespace(tpot=100, decodes=group, last_end=1000 - idle)
    last_end = 1000 - idle
    both: Rounds[object] = Rounds([Part(at_once, first, growth), Part(None, 30, 1)], 1000, 2 * sum(counts))
    before = 0
    for count in counts:
        gaps = both.gaps_of(0, before, count, at_once.last_end)
        _bank(at_once, gaps)  # type: ignore[arg-type]
        before += count
        at_once.last_end = both.end_of_member(0, before)
    for step in range(1, before + 1):
        end = both.end_of_member(0, step)
        ahead = min(ahead + 100 - (end - last_end), BANKED * 100)
        last_end = end
    assert (group.ahead, at_once.last_end) == (ahead, last_end)
