"""Block accounting of one model: free lists by slab, reference counts, prefix cache.

Who holds a block:

    free ──allocate──> used (references >= 1) ──release──> free                 if it was never published
      ^                  ^        |
      |                  └─match──┤ release
      └──drop (least recently used)── cached (no references, content kept under its key)

Pure bookkeeping: it touches no memory. Slabs come in through `add_slab` and leave, empty, through
`remove_slab`; `gather_slab` empties one by moving blocks, which the caller then copies.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from prism.engine.kv_layout import KvLayout
from prism.types import BlockId, Bytes, SlabId

BlockKey = bytes
ROOT_KEY: BlockKey = b""


class Move(NamedTuple):
    """Copy one block's bytes."""

    source: BlockId
    target: BlockId


class Gathered(NamedTuple):
    """A slab that is empty once `moves` have been carried out."""

    slab: SlabId
    moves: tuple[Move, ...]


def block_key(parent: BlockKey, tokens: Iterable[int]) -> BlockKey:
    """Key of a full block: a digest over all tokens from the beginning (128 bits)."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=16).digest()


@dataclass(slots=True)
class _Block:
    slab: SlabId
    references: int = 0
    key: BlockKey | None = None


@dataclass(slots=True)
class _Slab:
    blocks: tuple[BlockId, ...]
    free: list[BlockId] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return len(self.free) == len(self.blocks)


class KvSpace:
    """All KV blocks of one model."""

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self._slabs: dict[SlabId, _Slab] = {}
        self._blocks: dict[BlockId, _Block] = {}
        self._partial: dict[SlabId, None] = {}  # slabs with free and taken blocks: filled first
        self._empty: dict[SlabId, None] = {}
        self._published: dict[BlockKey, BlockId] = {}
        self._cached: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._num_free = 0

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
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return len(self._blocks) - self._num_free - len(self._cached)

    @property
    def empty_slabs(self) -> tuple[SlabId, ...]:
        """Slabs without any content."""
        return tuple(self._empty)

    @property
    def num_gatherable(self) -> int:
        """Slabs that could be given up if the whole prefix cache were dropped."""
        return (self._num_free + len(self._cached)) // self.layout.blocks_per_slab

    # --- slabs -------------------------------------------------------------------------------------

    def add_slab(self, slab: SlabId) -> None:
        """A slab of the pool now belongs to this model."""
        assert slab not in self._slabs
        offset = Bytes(slab * self.layout.slab_bytes)
        blocks = tuple(self.layout.block_at(offset, i) for i in range(self.layout.blocks_per_slab))
        self._slabs[slab] = _Slab(blocks, list(reversed(blocks)))
        for block in blocks:
            self._blocks[block] = _Block(slab)
        self._empty[slab] = None
        self._num_free += len(blocks)

    def remove_slab(self, slab: SlabId) -> None:
        """An empty slab leaves."""
        assert self._slabs[slab].is_empty
        for block in self._slabs.pop(slab).blocks:
            del self._blocks[block]
            self._num_free -= 1
        del self._empty[slab]

    def gather_slab(self) -> Gathered | None:
        """Empty one slab: drop the least recently used cached blocks, move what is left elsewhere.

        Returns None, and changes nothing, when free and cached blocks do not make up a slab. Tables that
        name a moved block must be rewritten and its bytes copied before the next step.
        """
        wanted = self.layout.blocks_per_slab
        if self._num_free + len(self._cached) < wanted or not self._slabs:
            return None
        self.drop_cached(max(0, wanted - self._num_free))
        if self._empty:
            return Gathered(next(iter(self._empty)), ())
        slab = max(self._partial, key=lambda s: len(self._slabs[s].free))
        return Gathered(slab, self._vacate(slab))

    def _vacate(self, slab: SlabId) -> tuple[Move, ...]:
        """Move every held block of a slab into free blocks of others, which are known to suffice."""
        home = self._slabs[slab]
        del self._partial[slab]  # so that no target lies in the slab itself
        moves = []
        free = set(home.free)
        for source in home.blocks:
            if source not in free:
                moves.append(Move(source, self._take_free()))
                self._rename(*moves[-1])
                home.free.append(source)
                self._num_free += 1
        self._empty[slab] = None
        return tuple(moves)

    def _rename(self, source: BlockId, target: BlockId) -> None:
        old, new = self._blocks[source], self._blocks[target]
        new.references, new.key = old.references, old.key
        old.references, old.key = 0, None
        if new.key is not None and self._published.get(new.key) == source:
            self._published[new.key] = target
        if source in self._cached:  # keeps its place in the order of use
            self._cached = OrderedDict((target if b == source else b, None) for b in self._cached)

    # --- blocks ------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[BlockId] | None:
        """So many blocks with one reference each, or None (and nothing taken) when fewer are free."""
        if count > self._num_free:
            return None
        blocks = [self._take_free() for _ in range(count)]
        for block in blocks:
            self._blocks[block].references = 1
        return blocks

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give up one reference to each. The last blocks of a sequence are the first to be dropped later."""
        for block in reversed(blocks):
            record = self._blocks[block]
            assert record.references > 0, block
            record.references -= 1
            if record.references == 0:
                if record.key is not None and self._published.get(record.key) == block:
                    self._cached[block] = None
                else:
                    record.key = None
                    self._put_free(block)

    def publish(self, block: BlockId, key: BlockKey) -> None:
        """The block is full and computed: others with the same prefix may use it. The first one wins."""
        record = self._blocks[block]
        assert record.references > 0
        if key not in self._published:
            self._published[key] = block
            record.key = key

    def match(self, keys: Iterable[BlockKey]) -> list[BlockId]:
        """Blocks of the longest published prefix of `keys`, each with one more reference."""
        found = []
        for key in keys:
            block = self._published.get(key)
            if block is None:
                break
            self._cached.pop(block, None)
            self._blocks[block].references += 1
            found.append(block)
        return found

    def num_published(self, keys: Iterable[BlockKey]) -> int:
        """How many blocks `match` would find."""
        count = 0
        for key in keys:
            if key not in self._published:
                break
            count += 1
        return count

    def drop_cached(self, count: int) -> int:
        """Free the least recently used cached blocks, `count` at most; returns how many."""
        dropped = min(count, len(self._cached))
        for _ in range(dropped):
            block, _none = self._cached.popitem(last=False)
            record = self._blocks[block]
            assert record.key is not None
            del self._published[record.key]
            record.key = None
            self._put_free(block)
        return dropped

    def _take_free(self) -> BlockId:
        slab = next(iter(self._partial), None)
        if slab is None:
            slab = next(iter(self._empty))
            del self._empty[slab]
            self._partial[slab] = None
        free = self._slabs[slab].free
        block = free.pop()
        if not free:
            del self._partial[slab]
        self._num_free -= 1
        return block

    def _put_free(self, block: BlockId) -> None:
        slab = self._blocks[block].slab
        home = self._slabs[slab]
        home.free.append(block)
        self._num_free += 1
        self._partial[slab] = None
        if home.is_empty:
            del self._partial[slab]
            self._empty[slab] = None

    def check(self) -> None:
        """Conservation: each block of each slab is exactly one of free, used and cached."""
        free = [block for slab in self._slabs.values() for block in slab.free]
        assert len(free) == len(set(free)) == self._num_free
        for block in free:
            assert self._blocks[block].references == 0 and self._blocks[block].key is None
            assert block not in self._cached
        for block in self._cached:
            record = self._blocks[block]
            assert record.references == 0 and record.key is not None
            assert self._published[record.key] == block
        used = [b for b, record in self._blocks.items() if record.references > 0]
        assert len(free) + len(used) + len(self._cached) == len(self._blocks)
        for slab, home in self._slabs.items():
            assert (slab in self._empty) == home.is_empty
            assert (slab in self._partial) == (0 < len(home.free) < len(home.blocks))
