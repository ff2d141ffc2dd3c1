"""Block accounting of one model: free lists by slab, reference counts, prefix cache.

Who holds a block:

    free ──allocate──> used (references >= 1) ──release──> free                 if it was never published
      ^                  ^        |
      |                  └─match──┤ release
      └──drop (least recently used)── cached (no references, content kept under its key)

Pure bookkeeping: it touches no memory. Slabs come in through `add_slab` and leave, empty, through
`remove_slab`; `gather` empties some. Both cost next to nothing for a slab without used blocks, so that
gigabytes change their owner between two steps: what was cached there is gone at once, but the cache still
lists it for a while (`Slab.is_gone`), and forgets it bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

from prism.engine.kv_layout import KvLayout
from prism.engine.kv_slab import Block, BlockKey, Dropped, DroppedGroup, Slab, grouped
from prism.types import BlockId, SlabId

TIDY = 4
"""Keys of the cache that are forgotten, of those whose blocks are gone, with each block that is taken."""
MOST_TIDY = 1024
"""And when the oldest is asked for: 0.4 ms."""


class Move(NamedTuple):
    """Copy one block's bytes."""

    source: BlockId
    target: BlockId


class Gathered(NamedTuple):
    """Slabs that are empty once `moves` have been carried out."""

    slabs: tuple[SlabId, ...]
    moves: tuple[Move, ...]
    dropped: tuple[DroppedGroup, ...] = ()
    """By slab, the one first that was used least recently."""


class KvSpace:
    """All KV blocks of one model."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._units_per_slab = layout.slab_bytes // layout.unit
        self._units_per_block = layout.block_bytes // layout.unit
        self._blocks_per_slab = layout.blocks_per_slab
        self._slabs: dict[SlabId, Slab] = {}
        self._partial: dict[SlabId, None] = {}  # slabs with free and taken blocks: filled first
        self._empty: dict[SlabId, None] = {}
        self._published: dict[BlockKey, Block] = {}
        self._cached: OrderedDict[BlockKey, None] = OrderedDict()  # least recently used first
        self._num_gone = 0
        """Keys that both still list though their blocks are gone."""
        self._gone: list[list[Block]] = []
        """Those blocks, by slab, and some whose keys are not there any more."""
        self._num_free = 0
        self._num_used = 0
        self._serial = 0

    # --- sizes -------------------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs that belong to this model's KV."""
        return len(self._slabs)

    @property
    def slabs(self) -> tuple[SlabId, ...]:
        """Those slabs."""
        return tuple(self._slabs)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def num_cached(self) -> int:
        """Blocks that only the prefix cache holds."""
        return len(self._cached) - self._num_gone

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self._num_used

    @property
    def num_uses(self) -> int:
        """Releases into the cache so far: the serial number of the latest."""
        return self._serial

    @property
    def oldest_use(self) -> int:
        """The serial number of the cached block that would be dropped first; `num_uses` without any.

        After many gigabytes have left, that of one of theirs for some more looks.
        """
        for _ in range(MOST_TIDY):
            key = next(iter(self._cached), None)
            if key is None:
                return self._serial
            if not self._published[key].home.is_gone:
                break
            self._forget(key)
        return self._published[next(iter(self._cached))].last_use if self._cached else self._serial

    @property
    def num_empty_slabs(self) -> int:
        """Slabs without any content."""
        return len(self._empty)

    @property
    def empty_slabs(self) -> tuple[SlabId, ...]:
        """Those slabs."""
        return tuple(self._empty)

    @property
    def num_unused_slabs(self) -> int:
        """Slabs that no sequence has blocks in."""
        return sum(not home.num_used for home in self._slabs.values())

    @property
    def num_gatherable(self) -> int:
        """Slabs that could be given up if the whole prefix cache were dropped."""
        return (self._num_free + self.num_cached) // self.layout.blocks_per_slab

    # --- slabs -------------------------------------------------------------------------------------

    def add_slab(self, slab: SlabId) -> None:
        """A slab of the pool now belongs to this model."""
        assert slab not in self._slabs
        self._slabs[slab] = self._new_slab(slab)
        self._empty[slab] = None
        self._num_free += self._blocks_per_slab

    def remove_slab(self, slab: SlabId) -> None:
        """An empty slab leaves."""
        home = self._slabs.pop(slab)
        assert home.is_empty
        self._num_free -= home.count
        del self._empty[slab]

    def gather(self, count: int) -> Gathered:
        """Empty up to `count` slabs; none only when free and cached blocks do not make up a slab.

        1. Slabs that are empty.
        2. Slabs without used blocks, least recently used first: their cached blocks are dropped.
        3. If there are none of these, the slab with the fewest used blocks: they move elsewhere, where
           the least recently used cached blocks make room. Tables that name a moved block must be
           rewritten, and its bytes copied, before the next step.
        """
        found = list(self._empty)[:count]  # 1
        dropped: list[DroppedGroup] = []
        if len(found) < count:  # 2
            idle = [slab for slab, home in self._slabs.items() if not home.num_used and not home.is_empty]
            idle.sort(key=lambda slab: self._slabs[slab].last_use)
            for slab in idle[: count - len(found)]:
                dropped.append(self._drop_slab(slab))
                found.append(slab)
        if found or not count or not self.num_gatherable:
            return Gathered(tuple(found), (), tuple(dropped))
        slab = min(self._slabs, key=lambda slab: self._slabs[slab].num_used)  # 3
        records = self._drop_records(slab)
        home = self._slabs[slab]
        records += self.drop_cached(home.num_used + home.num_free - self._num_free)
        return Gathered((slab,), self._vacate(slab), (grouped(records),))

    def compact(self, count: int) -> Gathered:
        """Empty up to `count` slabs, or one by moving all its blocks, without any loss to the cache.

        None only when the free blocks do not make up a slab.
        """
        found = tuple(self._empty)[:count]
        if found or not count or self._num_free < self.layout.blocks_per_slab:
            return Gathered(found, ())
        slab = min(self._slabs, key=lambda slab: len(self._slabs[slab].records))
        return Gathered((slab,), self._vacate(slab))

    def _drop_slab(self, slab: SlabId) -> DroppedGroup:
        """Forget all cached blocks of a slab that has no used ones."""
        home = self._slabs[slab]
        records, home.records, home.is_gone = home.records, {}, True
        self._gone.append(list(records.values()))
        self._num_gone += len(records)
        self._num_free += len(records)
        self._slabs[slab] = self._new_slab(slab)
        self._partial.pop(slab, None)
        self._empty[slab] = None
        return DroppedGroup(records)

    def _drop_records(self, slab: SlabId) -> list[Dropped]:
        """Free the cached blocks of a slab that has used ones too."""
        dropped = []
        for block, record in list(self._slabs[slab].records.items()):
            if not record.references and record.key is not None:
                del self._published[record.key], self._cached[record.key]
                self._put_free(block)
                dropped.append(Dropped(record.key, block, record.last_use))
        return dropped

    def _vacate(self, slab: SlabId) -> tuple[Move, ...]:
        """Move all blocks of a slab into free blocks of others, which are known to suffice."""
        home = self._slabs[slab]
        self._partial.pop(slab, None)  # so that no target lies in the slab itself
        moves = []
        for source, record in home.records.items():
            (target,) = self._take_free(1)
            there = self._slabs[self._slab_of(target)]
            there.records[target] = record
            record.home, record.place = there, target
            there.num_used -= not record.references
            there.last_use = max(there.last_use, home.last_use)
            moves.append(Move(source, target))
        self._slabs[slab] = self._new_slab(slab)
        self._num_free += len(moves)
        self._num_used -= len(moves)
        self._empty[slab] = None
        return tuple(moves)

    # --- blocks ------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[BlockId] | None:
        """So many blocks with one reference each, or None (and nothing taken) when fewer are free."""
        if count > self._num_free:
            return None
        taken: list[BlockId] = []
        self._tidy(TIDY * count)
        while len(taken) < count:
            taken += self._take_free(count - len(taken))
        return taken

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give up one reference to each. The last blocks of a sequence are the first to be dropped later."""
        slabs = cast("dict[int, Slab]", self._slabs)  # SlabId() would be a call for each
        units, cached, serial, num_unused = self._units_per_slab, self._cached, self._serial, 0
        for block in reversed(blocks):  # long sequences have hundreds
            home = slabs[block // units]
            record = home.records[block]
            assert record.references > 0, block
            record.references -= 1
            if record.references:
                continue
            home.num_used -= 1
            num_unused += 1
            if record.key is not None:
                serial += 1
                home.last_use = record.last_use = serial
                cached[record.key] = None
            else:
                self._put_free(block)
        self._serial = serial
        self._num_used -= num_unused

    def publish(self, block: BlockId, key: BlockKey) -> None:
        """The block is full and computed: others with the same prefix may use it. The first one wins."""
        record = self._slabs[self._slab_of(block)].records[block]
        assert record.references > 0
        other = self._published.get(key)
        if other is not None:
            if not other.home.is_gone:
                return
            self._forget(key)
        self._published[key] = record
        record.key = key

    def match(self, keys: Iterable[BlockKey]) -> list[BlockId]:
        """Blocks of the longest published prefix of `keys`, each with one more reference."""
        found = []
        for key in keys:
            record = self._find(key)
            if record is None:
                break
            if not record.references:
                del self._cached[key]
                record.home.num_used += 1
                self._num_used += 1
            record.references += 1
            found.append(record.place)
        return found

    def num_published(self, keys: Iterable[BlockKey]) -> int:
        """How many blocks `match` would find."""
        count = 0
        for key in keys:
            if self._find(key) is None:
                break
            count += 1
        return count

    def is_missing(self, key: BlockKey) -> bool:
        """Whether no block here has this content."""
        return self._find(key) is None

    def drop_cached(self, count: int) -> list[Dropped]:
        """Free the least recently used cached blocks, `count` at most."""
        dropped: list[Dropped] = []
        while len(dropped) < count and self._cached:
            key, _none = self._cached.popitem(last=False)
            record = self._published.pop(key)
            if record.home.is_gone:
                self._num_gone -= 1
                continue
            self._put_free(record.place)
            dropped.append(Dropped(key, record.place, record.last_use))
        return dropped

    def _find(self, key: BlockKey) -> Block | None:
        record = self._published.get(key)
        return None if record is None or record.home.is_gone else record

    def _forget(self, key: BlockKey) -> None:
        """A key whose block is gone."""
        del self._published[key], self._cached[key]
        self._num_gone -= 1

    def _tidy(self, count: int) -> None:
        """Forget the keys of so many blocks that are gone."""
        while count and self._gone:
            record = self._gone[-1].pop()
            if not self._gone[-1]:
                self._gone.pop()
            if record.key is not None and self._published.get(record.key) is record:
                self._forget(record.key)
            count -= 1

    def _new_slab(self, slab: SlabId) -> Slab:
        return Slab(slab * self._units_per_slab, self._units_per_block, self._blocks_per_slab)

    def _slab_of(self, block: BlockId) -> SlabId:
        return SlabId(block // self._units_per_slab)

    def _take_free(self, count: int) -> list[BlockId]:
        """As many as one slab has of so many."""
        slab = next(iter(self._partial), None)
        if slab is None:
            slab = next(iter(self._empty))
            del self._empty[slab]
            self._partial[slab] = None
        home = self._slabs[slab]
        blocks = home.take(min(count, home.num_free))
        if not home.num_free:
            del self._partial[slab]
        self._num_free -= len(blocks)
        self._num_used += len(blocks)
        return blocks

    def _put_free(self, block: BlockId) -> None:
        slab = self._slab_of(block)
        home = self._slabs[slab]
        home.put(block)
        self._num_free += 1
        if home.is_empty:
            self._partial.pop(slab, None)
            self._empty[slab] = None
        else:
            self._partial[slab] = None

    def check(self) -> None:
        """Conservation: each block of each slab is exactly one of free, used and cached."""
        num_free = num_used = 0
        for slab, home in self._slabs.items():
            free = home.free_blocks()
            assert len(set(free) | home.records.keys()) == len(free) + len(home.records) == home.count
            assert home.num_free == len(free)
            used = {block for block, record in home.records.items() if record.references}
            for block in home.records.keys() - used:
                record = home.records[block]
                key = record.key
                assert key is not None and key in self._cached and self._published[key] is record
            assert all(r.home is home and r.place == block for block, r in home.records.items())
            assert home.num_used == len(used) and all(self._slab_of(b) == slab for b in home.records)
            assert (slab in self._empty) == home.is_empty
            assert (slab in self._partial) == (0 < home.num_free < home.count)
            num_free, num_used = num_free + len(free), num_used + len(used)
        assert (num_free, num_used) == (self._num_free, self._num_used)
        total = len(self._slabs) * self.layout.blocks_per_slab
        assert num_free + num_used + self.num_cached == total
        gone = {key: record for key, record in self._published.items() if record.home.is_gone}
        assert len(gone) == self._num_gone and all(key in self._cached for key in gone)
        assert {id(r) for r in gone.values()} <= {id(r) for records in self._gone for r in records}
