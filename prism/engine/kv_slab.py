"""One slab's blocks, and what is known of them when they have lost their place."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from operator import itemgetter
from typing import NamedTuple

from prism.types import BlockId

BlockKey = bytes
ROOT_KEY: BlockKey = b""


def block_key(parent: BlockKey, tokens: Iterable[int]) -> BlockKey:
    """Key of a full block: a digest over all tokens from the beginning (128 bits)."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=16).digest()


class Dropped(NamedTuple):
    """A cached block that has lost its place; its bytes are there until later work overwrites them."""

    key: BlockKey
    block: BlockId
    last_use: int
    """Grows with each block that is released into the cache; a sequence's beginning comes after its end."""


@dataclass(slots=True, eq=False)
class Block:
    """A block that is used or cached."""

    home: Slab
    place: BlockId
    references: int = 1
    key: BlockKey | None = None
    last_use: int = 0


class DroppedGroup:
    """Cached blocks of one slab that were dropped together; nothing is listed before somebody wants it."""

    __slots__ = ("_records",)

    def __init__(self, records: Mapping[BlockId, Block | Dropped]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Dropped]:
        """By place."""
        for block, record in sorted(self._records.items(), key=itemgetter(0)):
            assert record.key is not None
            yield Dropped(record.key, block, record.last_use)


def grouped(dropped: Iterable[Dropped]) -> DroppedGroup:
    """Blocks that were dropped one by one."""
    return DroppedGroup({each.block: each for each in dropped})


class Slab:
    """One slab's blocks. Those that were never taken are numbers only, so a new slab is made at once."""

    __slots__ = (
        "_first", "_fresh", "_returned", "_step", "count", "is_gone", "last_use", "num_used", "records",
    )  # fmt: skip

    def __init__(self, first: int, step: int, count: int) -> None:
        """`count` blocks from the id `first` on, `step` apart."""
        self._first = first
        self._step = step
        self._fresh = 0
        self._returned: list[BlockId] = []
        self.count = count
        self.records: dict[BlockId, Block] = {}
        self.num_used = 0
        self.last_use = 0
        """Serial number of the latest release of one of its blocks into the cache."""
        self.is_gone = False
        """Its blocks have been dropped, all at once."""

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self.count - len(self.records)

    @property
    def is_empty(self) -> bool:
        """All of them are free."""
        return not self.records

    def take(self, count: int) -> list[BlockId]:
        """So many free blocks become used: those that were given back first."""
        blocks = [self._returned.pop() for _ in range(min(count, len(self._returned)))]
        while len(blocks) < count:
            blocks.append(BlockId(self._first + self._fresh * self._step))
            self._fresh += 1
        for block in blocks:
            self.records[block] = Block(self, block)
        self.num_used += count
        return blocks

    def put(self, block: BlockId) -> None:
        """A block is free again."""
        del self.records[block]
        self._returned.append(block)

    def free_blocks(self) -> list[BlockId]:
        """All of them, for checks."""
        fresh = (BlockId(self._first + i * self._step) for i in range(self._fresh, self.count))
        return [*self._returned, *fresh]
