"""What a step takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import takewhile

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from prism.engine.host_blocks import HostPlace
from prism.engine.kv_blocks import KvSpace, Move
from prism.engine.kv_layout import KvLayout
from prism.engine.kv_slab import BlockKey
from prism.engine.scheduler import Scheduler, Slots
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.types import Bytes, RequestId, SamplingParams, SlabId

PROMPT = list(range(18))


def make(slots: Slots, num_slabs: int = 1) -> Scheduler:
    layout = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(1024))
    kv = KvSpace(layout)
    for slab in range(num_slabs):
        kv.add_slab(SlabId(slab))
    return Scheduler(kv, 8, slots)


def sequence(name: str, choice: int = 0, prompt: list[int] = PROMPT) -> Sequence:
    params = SamplingParams(n=2, max_tokens=4, temperature=0.0, seed=0)
    return Sequence(RequestId(name), choice, len(prompt), list(prompt), params, 0.0, max_len=100)


def wanted(scheduler: Scheduler) -> int:
    return sum(want.num_blocks for want in scheduler.wants(100))


def ran(scheduler: Scheduler, step: Step | None) -> None:
    """The step has run; each sequence that it sampled got a token."""
    assert step is not None
    for chunk in step.chunks:
        chunk.sequence.num_tabled = len(chunk.sequence.blocks)
        if chunk.samples:
            chunk.sequence.num_pending -= 1
            chunk.sequence.append(7)
    scheduler.computed(step)


def test_what_a_step_wants_knows_the_prefix_cache() -> None:
    """A step asked for, and took from other models, blocks that its prompts' prefixes already had."""
    scheduler = make(Slots(8))
    scheduler.add(sequence("first"))
    assert wanted(scheduler) == 5
    ran(scheduler, scheduler.schedule(100))
    scheduler.add(sequence("second"))
    assert wanted(scheduler) == 1  # 4 of 5 blocks are shared; the first needs no new one


def test_what_a_step_wants_counts_only_what_the_step_could_take() -> None:
    """Memory was taken from other models for sequences that had to wait for something else anyway."""
    scheduler = make(Slots(1))
    scheduler.add(sequence("r", choice=0))
    scheduler.add(sequence("r", choice=1))
    scheduler.add(sequence("s"))
    assert wanted(scheduler) == 5  # one place
    scheduler = make(Slots(8))
    scheduler.add(sequence("r", choice=0))
    ran(scheduler, scheduler.schedule(10))
    scheduler.add(sequence("r", choice=1))
    assert wanted(scheduler) == 2  # the second choice waits for the prompt that they share
    preempted = sequence("s")
    preempted.num_pending = 1
    scheduler.add(preempted)
    assert wanted(scheduler) == 2


def test_a_step_enters_no_more_blocks_than_the_lane_takes() -> None:
    """128 choices on one prompt of 70,000 tokens brought along more than the staging area holds."""
    scheduler = make(Slots(8, max_entries=12), num_slabs=4)
    for i in range(5):
        scheduler.add(sequence(str(i), prompt=[i, *PROMPT[1:]]))
    sizes = []
    for _ in range(3):
        step = scheduler.schedule(1000)
        assert step is not None
        sizes.append(len(step.chunks))
        assert sum(len(c.sequence.blocks) - c.sequence.num_tabled for c in step.chunks) <= 12
        ran(scheduler, step)
    assert sizes == [2, 4, 5]  # who has been entered takes part again at once


def test_moved_tables_are_entered_again_over_several_steps() -> None:
    scheduler = make(Slots(8, max_entries=12), num_slabs=4)
    for i in range(5):
        scheduler.add(sequence(str(i), prompt=[i, *PROMPT[1:]]))
    for _ in range(3):
        ran(scheduler, scheduler.schedule(1000))
    scheduler.rename_blocks(tuple(Move(s.blocks[0], s.blocks[0]) for s in scheduler.running))
    first = scheduler.schedule(1000)
    assert first is not None and [c.sequence.request_id for c in first.chunks] == ["0", "1"]
    ran(scheduler, first)
    second = scheduler.schedule(1000)
    assert second is not None and {c.sequence.request_id for c in second.chunks} >= {"2", "3"}


def test_a_sequence_alone_may_always_be_entered() -> None:
    scheduler = make(Slots(8, max_entries=2))
    scheduler.add(sequence("large"))
    step = scheduler.schedule(1000)
    assert step is not None and len(step.chunks) == 1


class Tier:
    """Has all blocks of a prompt, and counts who uses them."""

    def __init__(self, keys: Iterable[BlockKey]) -> None:
        self.keys = list(keys)
        self.used: list[BlockKey] = []

    def num_worth(self, keys: Iterable[BlockKey]) -> int:
        return len(list(takewhile(lambda key: key in self.keys, keys)))

    def use(self, key: BlockKey) -> HostPlace:
        self.used.append(key)
        return HostPlace(0, self.keys.index(key))


LAYOUT = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(256))


def waiting(tokens: list[int], name: str = "r") -> Sequence:
    params = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
    return Sequence(RequestId(name), 0, len(tokens), list(tokens), params, 0.0, max_len=1000)


def scheduler_with(num_slabs: int) -> Scheduler:
    kv = KvSpace(LAYOUT)
    for slab in range(num_slabs):
        kv.add_slab(SlabId(slab))
    return Scheduler(kv, 8, Slots(8))


def test_a_prefix_is_fetched_and_not_computed() -> None:
    scheduler, prompt = scheduler_with(4), list(range(18))
    tier = scheduler.host = Tier(waiting(prompt).full_keys(4, 17))
    choice = waiting(prompt)
    scheduler.add(choice)
    assert wanted(scheduler) == 5
    step = scheduler.schedule(100)
    assert step is not None
    ((_, start, length, samples),) = step.chunks
    assert (start, length, samples) == (16, 2, True) and choice.num_cached == 16
    assert [fetch.block for fetch in step.fetches] == choice.blocks[:4] and tier.used == tier.keys
    assert not set(step.new_blocks) & {fetch.block for fetch in step.fetches}, "they would be zeroed"


def test_pieces_on_the_device_and_in_host_memory_take_turns() -> None:
    scheduler, prompt = scheduler_with(4), list(range(30))
    keys = waiting(prompt).full_keys(4, 29)
    here = scheduler.kv.allocate(3) or []
    for block, key in zip(here, (keys[1], keys[2], keys[5]), strict=True):
        scheduler.kv.publish(block, key)
    scheduler.kv.release(here)
    scheduler.host = Tier([keys[0], *keys[3:]])
    choice = waiting(prompt)
    scheduler.add(choice)
    assert wanted(scheduler) == 5
    step = scheduler.schedule(100)
    assert step is not None and step.chunks[0].start == 28
    assert len(step.fetches) == 4 and [choice.blocks[i] for i in (1, 2, 5)] == here
    scheduler.kv.check()


def test_what_lacks_blocks_to_fetch_computes_one_and_looks_again() -> None:
    """It computed thousands of tokens that it could have fetched a moment later."""
    scheduler, prompt = scheduler_with(1), list(range(42))
    scheduler.host = Tier(waiting(prompt).full_keys(4, 41))
    choice = waiting(prompt)
    scheduler.add(choice)
    assert wanted(scheduler) == 11
    step = scheduler.schedule(100)
    assert step is not None
    assert (len(step.fetches), step.chunks[0].start, step.chunks[0].length) == (3, 12, 4)
    scheduler.kv.add_slab(SlabId(1))
    scheduler.kv.add_slab(SlabId(2))
    assert wanted(scheduler) == 7
    step = scheduler.schedule(100)  # the one before may still be queued
    assert step is not None
    assert (len(step.fetches), step.chunks[0].start, step.chunks[0].length) == (6, 40, 2)
    assert choice.num_published == 10 and scheduler.num_prefix_hits == 36
    scheduler.kv.check()


def test_cached_blocks_that_a_step_takes_are_told() -> None:
    """Whoever saves them must copy them before the step writes there."""
    scheduler = scheduler_with(1)
    (old,) = scheduler.kv.allocate(1) or []
    scheduler.kv.publish(old, b"old")
    scheduler.kv.release([old])
    choice = waiting(list(range(12)))
    scheduler.add(choice)
    step = scheduler.schedule(100)
    assert step is not None and not step.dropped
    choice.num_pending = 0
    choice.append(7)
    step = scheduler.schedule(100)
    assert step is not None and [(item.key, item.block) for item in step.dropped] == [(b"old", old)]
    assert step.new_blocks == (old,) and scheduler.num_preemptions == 0


def test_a_preempted_sequence_leaves_its_blocks_to_be_found() -> None:
    """Those of a step that was still queued were lost, and computed again."""
    scheduler = scheduler_with(4)
    choice = waiting(list(range(18)))
    scheduler.add(choice)
    assert scheduler.schedule(100) is not None
    assert scheduler.preempt_youngest(2) == 1
    assert scheduler.kv.num_cached == 4 and scheduler.kv.num_used == 0
    scheduler.kv.check()


def test_a_preempted_sequence_begins_again_with_all_that_it_had() -> None:
    """One block was enough: it held what others wanted, came no further, and gave way once more."""
    scheduler = make(Slots(8))
    young = waiting(list(range(18)))
    scheduler.add(young)
    ran(scheduler, scheduler.schedule(100))
    assert scheduler.preempt_youngest(1) == 1 and young.is_again
    scheduler.kv.drop_cached(5)
    taken = scheduler.kv.allocate(scheduler.kv.num_free - 4) or []
    assert scheduler.schedule(100) is None, "five blocks for 19 tokens and the next one"
    assert [(want.num_blocks, want.is_again) for want in scheduler.wants(4)] == [(5, True)]
    scheduler.kv.release(taken[:1])
    step = scheduler.schedule(4)
    assert step is not None and step.chunks[0].length == 4 and not young.is_again
    assert [want.is_again for want in scheduler.wants(4)] == [False]
    scheduler.kv.check()
    scheduler.check()


def test_a_preempted_sequence_needs_no_room_for_what_is_found() -> None:
    scheduler = make(Slots(8))
    young = waiting(list(range(18)))
    scheduler.add(young)
    ran(scheduler, scheduler.schedule(100))
    assert scheduler.preempt_youngest(1) == 1
    taken = scheduler.kv.allocate(scheduler.kv.num_free - 1) or []
    assert taken and [(want.num_blocks, want.num_found) for want in scheduler.wants(100)] == [(1, 4)]
    step = scheduler.schedule(100)
    assert step is not None and (step.chunks[0].start, step.chunks[0].length) == (16, 3)


def test_what_is_found_is_dropped_after_what_was_cached_later() -> None:
    """The oldest were dropped first: all that a sequence would find, block by block, each for another."""
    scheduler = make(Slots(8))
    young = waiting(list(range(18)))
    scheduler.add(young)
    ran(scheduler, scheduler.schedule(100))
    assert scheduler.preempt_youngest(1) == 1
    later = scheduler.kv.allocate(scheduler.kv.num_free) or []
    for block in later:
        scheduler.kv.publish(block, b"%d" % block)
    scheduler.kv.release(later)
    (want,) = scheduler.wants(100)
    assert (want.num_blocks, want.num_found) == (1, 4)
    scheduler.keep_found()
    scheduler.kv.drop_cached(1)
    step = scheduler.schedule(100)
    assert step is not None and (step.chunks[0].start, step.chunks[0].length) == (16, 3)
    scheduler.kv.check()


ACTIONS = st.lists(st.integers(0, 99), min_size=20, max_size=120)


def play(actions: list[int], look: Callable[[Scheduler], None], max_entries: int = 100) -> list[object]:
    """What steps of these actions want and are, two of them queued; `look` is called behind each.

    Sequences of different lengths, some with penalties, come, end, give way to others, are renamed, and are
    cut by a shorter context.
    """
    layout = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(1024))
    kv = KvSpace(layout)
    kv.add_slab(SlabId(0))
    scheduler, queued, seen = Scheduler(kv, 8, Slots(8, max_entries)), deque[Step](), list[object]()
    for number, action in enumerate(actions):
        if action % 3 == 0:
            penalty = 0.5 if action % 7 == 0 else 0.0
            params = SamplingParams(max_tokens=1 + action, presence_penalty=penalty, seed=0)
            prompt = [number] * (1 + action % 13)
            new = Sequence(RequestId(str(number)), 0, len(prompt), prompt, params, float(number), max_len=60)
            scheduler.add(new)
        if action % 10 == 1:
            scheduler.preempt_youngest(1)
        if action % 10 == 2:
            scheduler.rename_blocks(tuple(Move(s.blocks[0], s.blocks[0]) for s in scheduler.running[:1]))
        if action % 10 == 4:
            for running in scheduler.running:
                running.limit(30 + action)
        seen.append(scheduler.wants(1 + action))
        step = scheduler.schedule(1 + action)
        if step is not None:
            queued.append(step)
            names = [[s.request_id for s in some] for some in (step.decodes, step.begun)]
            chunks = [(c.sequence.request_id, c.start, c.length, c.samples) for c in step.chunks]
            seen.append((names, chunks, step.positions.tolist(), step.context, step.new_blocks, step.dropped))
            for chunk in step.chunks:
                chunk.sequence.num_tabled = len(chunk.sequence.blocks)
        while len(queued) > (step is not None):
            _commit(scheduler, queued.popleft())
        kv.check()
        look(scheduler)
    return seen


@given(ACTIONS)
def test_decodes_that_need_nothing_but_their_turn_need_nothing_else(actions: list[int]) -> None:
    """What the scheduler notes in `ready_until` is what a closer look finds, whatever happened between."""

    def look(scheduler: Scheduler) -> None:
        for ready in (s for s in scheduler.running if s.num_computed < s.ready_until):
            assert ready.num_missing == 1 and ready.can_step and not ready.needs_history
            assert ready.num_computed < len(ready.blocks) * 4

    play(actions, look)


def test_a_decode_takes_the_short_way_to_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs, which keep no tables, it never did: their `num_tabled` is 0."""
    scheduler = make(Slots(8))
    monkeypatch.setattr(scheduler, "_go_on", None)
    for tabled in (True, False):
        new = sequence(f"r{tabled}", prompt=PROMPT[:4])
        scheduler.add(new)
        step = scheduler.schedule(100)
        assert step is not None
        new.num_tabled = tabled
        _commit(scheduler, step)
        step = scheduler.schedule(100)
        assert step is not None and step.begun == (new,) and len(step.new_blocks) == 1 == len(new.blocks) - 1
        _commit(scheduler, step)
        scheduler.remove(new)
    scheduler.kv.check()


@given(ACTIONS, st.sampled_from((2, 3, 100)))
def test_the_short_way_to_a_block_leads_where_the_long_one_does(actions: list[int], entries: int) -> None:
    num_short = 0

    def count(scheduler: Scheduler) -> None:
        nonlocal num_short
        num_short += any(s.needs_a_block for s in scheduler.running)

    short = play(actions, count, entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequence, "needs_a_block", property(lambda _: False))
        assert play(actions, lambda _: None, entries) == short
    event("a short way was there" if num_short else "none was")


def _commit(scheduler: Scheduler, step: Step) -> None:
    for drawn in step.sampled:
        drawn.num_pending -= 1
        if not drawn.is_ended:
            drawn.append(7)
            if len(drawn.tokens) >= drawn.end:
                scheduler.remove(drawn)
    scheduler.computed(step)
