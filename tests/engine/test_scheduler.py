"""What a step takes."""

from __future__ import annotations

from prism.engine.kv_blocks import KvSpace
from prism.engine.kv_layout import KvLayout
from prism.engine.scheduler import Scheduler, Slots, Step
from prism.engine.sequence import Sequence
from prism.types import Bytes, RequestId, SamplingParams, SlabId

PROMPT = list(range(18))


def make(slots: Slots, num_slabs: int = 1) -> Scheduler:
    layout = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(1024))
    kv = KvSpace(layout)
    for slab in range(num_slabs):
        kv.add_slab(SlabId(slab))
    return Scheduler(kv, 8, slots)


def sequence(name: str, choice: int = 0, prompt: list[int] = PROMPT) -> Sequence:
    params = SamplingParams(max_tokens=4, temperature=0.0, seed=0)
    return Sequence(RequestId(name), choice, len(prompt), list(prompt), params, 0.0, max_len=100)


def ran(scheduler: Scheduler, step: Step | None) -> None:
    """The step has run; each sequence that it sampled got a token."""
    assert step is not None
    for chunk in step.chunks:
        chunk.sequence.num_tabled = len(chunk.sequence.blocks)
        if chunk.samples:
            chunk.sequence.num_pending -= 1
            chunk.sequence.append(7)
    scheduler.computed(step)


def test_blocks_wanted_knows_the_prefix_cache() -> None:
    """A step asked for, and took from other models, blocks that its prompts' prefixes already had."""
    scheduler = make(Slots(8))
    scheduler.add(sequence("first"))
    assert scheduler.blocks_wanted(100) == 5
    ran(scheduler, scheduler.schedule(100))
    scheduler.add(sequence("second"))
    assert scheduler.blocks_wanted(100) == 1  # 4 of 5 blocks are shared; the first needs no new one


def test_blocks_wanted_counts_only_what_the_step_could_take() -> None:
    """Memory was taken from other models for sequences that had to wait for something else anyway."""
    scheduler = make(Slots(1))
    scheduler.add(sequence("r", choice=0))
    scheduler.add(sequence("r", choice=1))
    scheduler.add(sequence("s"))
    assert scheduler.blocks_wanted(100) == 5  # one place
    scheduler = make(Slots(8))
    scheduler.add(sequence("r", choice=0))
    ran(scheduler, scheduler.schedule(10))
    scheduler.add(sequence("r", choice=1))
    assert scheduler.blocks_wanted(100) == 2  # the second choice waits for the prompt that they share
    preempted = sequence("s")
    preempted.num_pending = 1
    scheduler.add(preempted)
    assert scheduler.blocks_wanted(100) == 2


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
    for running in scheduler.running:
        running.num_tabled = 0
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
