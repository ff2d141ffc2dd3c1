"""Random operations on block accounting keep its laws, and contents follow their blocks."""

from __future__ import annotations

import time
from collections.abc import Iterable

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prism.engine.kv_blocks import Gathered, KvSpace
from prism.engine.kv_layout import KvLayout
from prism.engine.kv_slab import Dropped, block_key
from prism.types import Bytes, MiB, SlabId

LAYOUT = KvLayout(
    tokens_per_block=16, block_bytes=Bytes(3 * 1024), unit=Bytes(1024), slab_bytes=Bytes(16 * 1024)
)


class KvSpaceMachine(RuleBasedStateMachine):
    """A model of the space: what each held block contains."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvSpace(LAYOUT)
        self.next_slab = 0
        self.held: list[list[int]] = []  # block tables
        self.content: dict[int, bytes] = {}  # what was written where
        self.serial = 0

    @rule()
    @precondition(lambda self: self.kv.num_slabs < 6)
    def add_slab(self) -> None:
        self.kv.add_slab(SlabId(self.next_slab))
        self.next_slab += 1

    @rule(count=st.integers(1, 7))
    def allocate(self, count: int) -> None:
        free = self.kv.num_free
        blocks = self.kv.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            for block in blocks:
                self.serial += 1
                self.content[block] = b"%d" % self.serial
            self.held.append(list(blocks))

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def publish(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.held))
        for block in table:
            self.kv.publish(block, b"key" + self.content[block])

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.kv.release(self.held.pop(index))

    @rule(data=st.data())
    @precondition(lambda self: self.held)
    def match(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.held))
        found = self.kv.match([b"key" + self.content[b] for b in table])
        for block, expected in zip(found, table, strict=False):
            assert self.content[block] == self.content[expected]
        if found:
            self.held.append(found)

    @rule(count=st.integers(0, 9))
    def drop(self, count: int) -> None:
        cached = self.kv.num_cached
        dropped = self.kv.drop_cached(count)
        assert len(dropped) == min(count, cached)
        self.hold_what_they_say(dropped)
        assert [item.last_use for item in dropped] == sorted(item.last_use for item in dropped)

    @rule(count=st.integers(1, 4))
    def gather(self, count: int) -> None:
        gatherable = self.kv.num_gatherable
        self.carry_out(self.kv.gather(count), min(count, gatherable))

    @rule(count=st.integers(1, 4))
    def compact(self, count: int) -> None:
        free, cached = self.kv.num_free // LAYOUT.blocks_per_slab, self.kv.num_cached
        self.carry_out(self.kv.compact(count), min(count, free))
        assert self.kv.num_cached == cached

    def hold_what_they_say(self, dropped: Iterable[Dropped]) -> None:
        """Before anything else is written there."""
        for key, block, _ in dropped:
            assert key == b"key" + self.content[block] and self.kv.is_missing(key)

    def carry_out(self, gathered: Gathered, most: int) -> None:
        assert bool(gathered.slabs) == (most > 0)
        assert len(gathered.slabs) <= most
        assert len(gathered.dropped) <= max(1, most)
        for group in gathered.dropped:
            assert len(group) == len(list(group))
            self.hold_what_they_say(group)
            assert [item.block for item in group] == sorted(item.block for item in group)
        copies = {target: self.content[source] for source, target in gathered.moves}
        self.content.update(copies)
        renamed = dict(gathered.moves)
        self.held = [[renamed.get(block, block) for block in table] for table in self.held]
        for slab in gathered.slabs:
            self.kv.remove_slab(slab)

    @invariant()
    def laws(self) -> None:
        self.kv.check()
        held = {block for table in self.held for block in table}
        assert len(held) == self.kv.num_used


TestKvSpace = KvSpaceMachine.TestCase
TestKvSpace.settings = settings(max_examples=60, stateful_step_count=40)


def test_least_recently_used_is_dropped_first() -> None:
    kv = KvSpace(LAYOUT)
    kv.add_slab(SlabId(0))
    tables = []
    for name in (b"old", b"new"):
        (block,) = kv.allocate(1) or []
        kv.publish(block, name)
        tables.append(block)
    for block in tables:
        kv.release([block])
    kv.drop_cached(1)
    assert kv.match([b"old"]) == []
    assert kv.match([b"new"]) == [tables[1]]


def test_end_of_a_sequence_is_dropped_before_its_beginning() -> None:
    kv = KvSpace(LAYOUT)
    kv.add_slab(SlabId(0))
    blocks = kv.allocate(3) or []
    keys = [b"a", b"b", b"c"]
    for block, key in zip(blocks, keys, strict=True):
        kv.publish(block, key)
    kv.release(blocks)
    kv.drop_cached(1)
    assert kv.match(keys) == blocks[:2]


def test_key_depends_on_all_tokens_before() -> None:
    first = block_key(b"", [1, 2])
    assert block_key(first, [3]) != block_key(b"", [3])
    assert block_key(b"", [1, 23]) != block_key(b"", [12, 3])


def test_gigabytes_leave_a_cache_at_once() -> None:
    """10 GiB in slabs of 32 MiB took 7 s: each moved block rebuilt the whole order of use."""
    layout = KvLayout(16, Bytes(512 * 1024), Bytes(64 * 1024), Bytes(32 * MiB))
    kv = KvSpace(layout)
    for slab in range(320):
        kv.add_slab(SlabId(slab))
    tables = [kv.allocate(250) or [] for _ in range(80)]
    for number, table in enumerate(tables):
        for index, block in enumerate(table):
            kv.publish(block, b"%d.%d" % (number, index))
    for table in tables:
        kv.release(table)
    begin = time.process_time()
    gathered = kv.gather(300)
    for slab in gathered.slabs:
        kv.remove_slab(slab)
    assert len(gathered.slabs) == 300 and not gathered.moves
    assert time.process_time() - begin < 0.5  # it is 3 ms
    kv.check()


def test_what_is_gone_is_neither_found_nor_dropped_again() -> None:
    """The cache still lists it: its key can be published anew, and is then the new block's."""
    kv = KvSpace(LAYOUT)
    for slab in range(4):
        kv.add_slab(SlabId(slab))
    keys = [b"%d" % number for number in range(4 * LAYOUT.blocks_per_slab)]
    blocks = kv.allocate(len(keys)) or []
    for block, key in zip(blocks, keys, strict=True):
        kv.publish(block, key)
    kv.release(blocks)
    oldest = kv.oldest_use
    gone = kv.gather(3)
    lost = {item.key for group in gone.dropped for item in group}
    assert len(lost) == 3 * LAYOUT.blocks_per_slab and kv.num_cached == LAYOUT.blocks_per_slab
    assert kv.oldest_use > oldest and kv.oldest_use == 1 + min(
        set(range(4 * LAYOUT.blocks_per_slab))
        - {item.last_use - 1 for group in gone.dropped for item in group}
    ), "what is left is as old as it is"
    assert all(kv.is_missing(key) == (key in lost) for key in keys)
    assert kv.match(sorted(lost)) == [] and kv.num_published(sorted(lost)) == 0
    again = kv.allocate(2) or []
    for block, key in zip(again, sorted(lost), strict=False):
        kv.publish(block, key)
    kv.release(again)
    kv.check()
    assert kv.match(sorted(lost)[:2]) == again and kv.oldest_use >= oldest
    kv.release(again)
    dropped = kv.drop_cached(100)
    assert {item.key for item in dropped} == {*keys} - lost | {*sorted(lost)[:2]}
    kv.check()
    assert kv.num_cached == 0 and kv.num_free == len(keys) and kv.oldest_use == kv.num_uses


def test_what_is_gone_is_forgotten_in_the_end() -> None:
    """Also behind a block of a slab that stays: keys would pile up there."""
    kv = KvSpace(LAYOUT)
    kv.add_slab(SlabId(0))
    kept, held = kv.allocate(2) or []
    kv.publish(kept, b"kept")
    kv.release([kept])
    for turn in range(50):
        kv.add_slab(SlabId(1))
        blocks = kv.allocate(kv.num_free) or []
        for block in blocks:
            kv.publish(block, b"%d.%d" % (turn, block))
        kv.release(blocks)
        kv.gather(1)
        kv.remove_slab(SlabId(1))
        kv.check()
    assert len(kv._published) < 4 * LAYOUT.blocks_per_slab
    assert kv.match([b"kept"]) == [kept] and kv.num_used == 2 and held != kept


def test_the_slab_used_least_recently_goes_first() -> None:
    kv = KvSpace(LAYOUT)
    for slab in range(3):
        kv.add_slab(SlabId(slab))
    tables = [kv.allocate(LAYOUT.blocks_per_slab) or [] for _ in range(3)]
    for table in tables:
        for block in table:
            kv.publish(block, b"%d" % block)
    for number in (1, 0, 2):
        kv.release(tables[number])
    slab = LAYOUT.slab_bytes // LAYOUT.unit
    assert kv.gather(1).slabs == (tables[1][0] // slab,)
    assert len(kv.match([b"%d" % tables[0][0]])) == 1
