"""KV blocks that wait in host memory: which ones, where, and who must make room. Pure accounting.

The tier is cut into chunks. A chunk holds blocks of one size, of any models; an empty chunk takes any size.

    free ──put──> held (indexed by model and key) ──its chunk makes room, or its model is forgotten──> free
                    |                                                          ^
                    └── forgotten while a copy uses it ──> ownerless ──release─┘

Room is made chunk by chunk, the one first that nobody has used for the longest time: so chunks pass between
sizes of blocks, and what was saved together lies together. A reference is a copy on its way in or out: while
a place has any, it is given to no other block and its chunk is not emptied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from prism.engine.kv_slab import BlockKey
from prism.types import BlockId, Bytes, ModelId


class HostPlace(NamedTuple):
    """A block's place: its chunk, and its number in there."""

    chunk: int
    slot: int


class Fetch(NamedTuple):
    """Copy a block's bytes from host memory to the device."""

    place: HostPlace
    block: BlockId


class HostTier(Protocol):
    """What one model's scheduler sees of the tier."""

    def num_worth(self, keys: Iterable[BlockKey]) -> int:
        """How many of these blocks, from the first on, are here and quicker fetched than computed again."""
        ...

    def use(self, key: BlockKey) -> HostPlace:
        """The place of one of those; it stays until what is to be copied from there has been."""
        ...


@dataclass(slots=True)
class _Entry:
    """What lies at a place; `model` is None when its model was forgotten while a copy still used it."""

    model: ModelId | None
    key: BlockKey
    references: int


class _Chunk:
    """One chunk's places, of blocks of `block_bytes`."""

    __slots__ = ("block_bytes", "entries", "free", "last_use", "num_references")

    def __init__(self) -> None:
        self.block_bytes = Bytes(0)
        self.free: list[int] = []
        self.entries: dict[int, _Entry] = {}
        self.last_use = 0
        self.num_references = 0

    def lay_out(self, block_bytes: Bytes, count: int) -> None:
        """An empty chunk is for blocks of this size from now on; its places are taken in order."""
        self.block_bytes = block_bytes
        self.free = list(range(count - 1, -1, -1))


class HostBlocks:
    """All blocks of one worker's host tier, within `max_chunks`."""

    def __init__(self, chunk_bytes: Bytes, max_chunks: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.max_chunks = max_chunks
        self._chunks: list[_Chunk] = []
        self._empty: dict[int, None] = {}
        self._partial: dict[Bytes, dict[int, None]] = {}  # chunks with free and taken places, by size
        self._places: dict[ModelId, dict[BlockKey, HostPlace]] = {}
        self._bytes: dict[ModelId, int] = {}
        self._serial = 0

    # --- what there is -----------------------------------------------------------------------------

    @property
    def num_chunks(self) -> int:
        """Chunks that have memory."""
        return len(self._chunks)

    @property
    def num_empty(self) -> int:
        """Those that hold nothing."""
        return len(self._empty)

    def bytes_of(self, model: ModelId) -> Bytes:
        """Blocks of a model."""
        return Bytes(self._bytes.get(model, 0))

    def has(self, model: ModelId, key: BlockKey) -> bool:
        """Whether the block is here, or on its way."""
        return key in self._places.get(model, ())

    def num_obtainable(self, block_bytes: Bytes) -> int:
        """Blocks of a size that could be put now, others making room."""
        partial = self._partial.get(block_bytes, {})
        room = sum(len(self._chunks[number].free) for number in partial)
        clearable = sum(
            not chunk.num_references and number not in partial for number, chunk in enumerate(self._chunks)
        )
        return room + clearable * (self.chunk_bytes // block_bytes)

    # --- chunks and blocks -------------------------------------------------------------------------

    def add_chunk(self) -> None:
        """One more chunk has memory."""
        assert len(self._chunks) < self.max_chunks
        self._empty[len(self._chunks)] = None
        self._chunks.append(_Chunk())

    def put(self, model: ModelId, key: BlockKey, block_bytes: Bytes) -> HostPlace | None:
        """A place for a block that is not here yet, with one reference for its copy; None if there is none.

        1. A chunk of its size that has room.
        2. An empty chunk.
        3. The chunk used least recently, of any size, that no copy uses.
        """
        assert not self.has(model, key) and 0 < block_bytes <= self.chunk_bytes
        chunk = self._chunk_with_room(block_bytes)
        if chunk is None:
            return None
        home = self._chunks[chunk]
        place = HostPlace(chunk, home.free.pop())
        home.entries[place.slot] = _Entry(model, key, 1)
        home.num_references += 1
        self._places.setdefault(model, {})[key] = place
        self._bytes[model] = self._bytes.get(model, 0) + block_bytes
        self._touch(home)
        if not home.free:
            self._partial[block_bytes].pop(chunk, None)
        return place

    def use(self, model: ModelId, key: BlockKey) -> HostPlace:
        """The place of a block that is here, with one more reference."""
        place = self._places[model][key]
        home = self._chunks[place.chunk]
        home.entries[place.slot].references += 1
        home.num_references += 1
        self._touch(home)
        return place

    def touch(self, model: ModelId, key: BlockKey) -> None:
        """The block is of use again."""
        self._touch(self._chunks[self._places[model][key].chunk])

    def release(self, place: HostPlace) -> None:
        """A copy from or to this place has run."""
        home = self._chunks[place.chunk]
        entry = home.entries[place.slot]
        assert entry.references > 0, place
        entry.references -= 1
        home.num_references -= 1
        if entry.model is None and not entry.references:
            self._free(place)

    def forget(self, model: ModelId) -> None:
        """Nothing of this model is worth anything any more."""
        for place in self._places.pop(model, {}).values():
            entry = self._chunks[place.chunk].entries[place.slot]
            entry.model = None
            if not entry.references:
                self._free(place)
        self._bytes.pop(model, None)

    def _chunk_with_room(self, block_bytes: Bytes) -> int | None:
        partial = self._partial.setdefault(block_bytes, {})
        if partial:  # 1
            return next(iter(partial))
        chunk = next(iter(self._empty), None)  # 2
        if chunk is None:  # 3
            idle = [i for i, c in enumerate(self._chunks) if not c.num_references]
            chunk = min(idle, key=lambda i: self._chunks[i].last_use, default=None)
            if chunk is None:
                return None
            self._clear(chunk)
        del self._empty[chunk]
        self._chunks[chunk].lay_out(block_bytes, self.chunk_bytes // block_bytes)
        partial[chunk] = None
        return chunk

    def _clear(self, chunk: int) -> None:
        """Drop all blocks of a chunk, none of which has references."""
        home = self._chunks[chunk]
        for entry in home.entries.values():
            assert entry.model is not None
            del self._places[entry.model][entry.key]
            self._bytes[entry.model] -= home.block_bytes
        self._become_empty(chunk)

    def _free(self, place: HostPlace) -> None:
        """A place that no index names is free again."""
        home = self._chunks[place.chunk]
        del home.entries[place.slot]
        home.free.append(place.slot)
        self._partial[home.block_bytes][place.chunk] = None
        if not home.entries:
            self._become_empty(place.chunk)

    def _become_empty(self, chunk: int) -> None:
        self._partial[self._chunks[chunk].block_bytes].pop(chunk, None)
        self._chunks[chunk] = _Chunk()
        self._empty[chunk] = None

    def _touch(self, chunk: _Chunk) -> None:
        self._serial += 1
        chunk.last_use = self._serial

    def check_references(self, places: Iterable[HostPlace]) -> None:
        """These, as often as they are named, and no others."""
        references: dict[HostPlace, int] = {}
        for place in places:
            references[place] = references.get(place, 0) + 1
        assert references == {
            HostPlace(number, slot): entry.references
            for number, chunk in enumerate(self._chunks)
            for slot, entry in chunk.entries.items()
            if entry.references
        }

    def check(self) -> None:
        """Conservation: each place of each chunk is free or holds one block, and every index is right."""
        assert len(self._chunks) <= self.max_chunks
        held: dict[ModelId, dict[BlockKey, HostPlace]] = {}
        sizes: dict[ModelId, int] = {}
        for number, chunk in enumerate(self._chunks):
            assert (number in self._empty) == (not chunk.entries)
            if not chunk.entries:
                continue
            count = self.chunk_bytes // chunk.block_bytes
            assert sorted([*chunk.free, *chunk.entries]) == list(range(count)), "a place is lost"
            assert (number in self._partial[chunk.block_bytes]) == bool(chunk.free)
            assert chunk.num_references == sum(e.references for e in chunk.entries.values())
            for slot, entry in chunk.entries.items():
                if entry.model is None:
                    assert entry.references, "an ownerless place that no copy uses"
                    continue
                held.setdefault(entry.model, {})[entry.key] = HostPlace(number, slot)
                sizes[entry.model] = sizes.get(entry.model, 0) + chunk.block_bytes
        assert held == {model: places for model, places in self._places.items() if places}
        assert sizes == {model: size for model, size in self._bytes.items() if size}
        listed = [chunk for chunks in self._partial.values() for chunk in chunks]
        assert len(listed) == len(set(listed)) and not set(listed) & set(self._empty)
