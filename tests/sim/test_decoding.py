"""Many steps at once give what one step after the other gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism.sim.decoding import DecodeGroup
from prism.sim.jobs import Job
from prism.types import ModelId, RequestId


def job(index: int, prompt: int, output: int) -> Job:
    made = Job(RequestId(f"{index:03d}"), ModelId("m"), index, prompt, output, due=0)
    made.produced = 1
    return made


sequences = st.lists(st.tuples(st.integers(1, 70), st.integers(2, 90)), min_size=1, max_size=6)


@given(sequences, st.integers(1, 80), st.integers(16, 20))
def test_steps_at_once_are_steps_one_by_one(lengths: list[tuple[int, int]], count: int, block: int) -> None:
    groups = DecodeGroup(block), DecodeGroup(block)
    for group in groups:
        for index, (prompt, output) in enumerate(lengths):
            group.join(job(index, prompt, output))
    at_once, single = groups
    count = min(count, at_once.steps_to_end())
    assert at_once.blocks_for(count) == _walk(single, count)
    at_once.begin(count)
    at_once.run(count)
    assert (at_once.context, at_once.num_blocks) == (single.context, single.num_blocks)
    assert [j.request_id for j in at_once.ended()] == [j.request_id for j in single.ended()]


def _walk(group: DecodeGroup, count: int) -> int:
    before = group.num_blocks
    for _ in range(count):
        group.begin(1)
        group.run(1)
    return group.num_blocks - before


@given(sequences, st.integers(0, 30))
def test_steps_within_is_the_most_that_fits(lengths: list[tuple[int, int]], blocks: int) -> None:
    group = DecodeGroup(16)
    for index, (prompt, output) in enumerate(lengths):
        group.join(job(index, prompt, output))
    count = group.steps_within(blocks)
    assert group.blocks_for(count) <= blocks < group.blocks_for(count + 1)


@given(sequences, st.lists(st.booleans(), min_size=1, max_size=60))
def test_blocks_are_those_of_the_tokens(lengths: list[tuple[int, int]], events: list[bool]) -> None:
    """Whoever leaves gives back exactly what it held, in the middle of a step too."""
    group = DecodeGroup(16)
    jobs = [job(index, prompt, output) for index, (prompt, output) in enumerate(lengths)]
    waiting, is_begun = list(jobs), False
    for joins in events:
        if joins and waiting and not is_begun:
            group.join(waiting.pop())
        elif group.size and not is_begun:
            group.begin(1)
            is_begun = True
        elif is_begun:
            if group.size > 1:
                group.leave(group.jobs()[0])
            group.run(1)
            is_begun = False
    for left in group.jobs():
        group.leave(left)
    assert (group.num_blocks, group.context, group.size) == (0, 0, 0)


@given(
    st.lists(st.tuples(st.sampled_from("jlbb"), st.integers(-50, 300), st.integers(-50, 200)), max_size=40)
)
def test_what_is_banked_for_all_at_once_is_what_each_has(events: list[tuple[str, int, int]]) -> None:
    """Streams join and leave between steps, whichever of them is the one that is ahead least."""
    group, ahead = DecodeGroup(16), dict[Job, int]()
    for index, (event, gain, most) in enumerate(events):
        if event == "j":
            joining = job(index, 10, 1000)
            group.join(joining, gain)
            ahead[joining] = gain
        elif event == "l" and ahead:
            leaving = list(ahead)[index % len(ahead)]
            group.leave(leaving)
            del ahead[leaving]
        elif event == "b":
            group.bank(gain, most)
            ahead = {each: gain + min(before, most) for each, before in ahead.items()}
        assert group.ahead == min(ahead.values(), default=0)


def test_a_sequence_ends_with_its_last_token() -> None:
    group = DecodeGroup(16)
    first, second = job(0, 10, 4), job(1, 20, 6)
    group.join(first)
    group.join(second)
    assert group.steps_to_end() == 3
    group.begin(3)
    group.run(3)
    assert group.ended() == [first]
    group.leave(first)
    assert first.produced == 4 and group.steps_to_end() == 2
