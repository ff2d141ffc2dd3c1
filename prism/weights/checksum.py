"""Checksums of packed weights, equal wherever they are computed.

The checksum of a chunk is `sum(word[i] * (2 i + 1)) mod 2^64` over its 64-bit little-endian words. Odd
factors are invertible, so a change within any one word always changes the sum; exchanged words do so too,
unless their difference times their distance is a multiple of 2^63. It guards against lost, torn and
overwritten bytes, not against an adversary. The last chunk may be short; sizes are multiples of 8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.types import Bytes, MiB

CHUNK_BYTES = Bytes(4 * MiB)
WORD_BYTES = 8


def num_chunks(size: Bytes) -> int:
    """Chunks of a buffer."""
    return -(-size // CHUNK_BYTES)


def table_bytes(size: Bytes) -> Bytes:
    """Size of the table of a buffer's checksums."""
    return Bytes(num_chunks(size) * WORD_BYTES)


def factors() -> NDArray[np.uint64]:
    """The factors of a whole chunk: 1, 3, 5, ..."""
    return np.arange(1, 2 * (CHUNK_BYTES // WORD_BYTES), 2, dtype=np.uint64)


class Part(NamedTuple):
    """Part of a range of bytes that lies within one chunk."""

    chunk: int
    first_word: int
    """Its place in the chunk."""
    begin: int
    """Its place in the range."""
    size: int


def parts(begin: Bytes, size: Bytes) -> Iterator[Part]:
    """Cuts `size` bytes at byte `begin` of a buffer at the bounds of chunks. A sum's parts add up to it."""
    at, end = int(begin), begin + size
    while at < end:
        chunk, offset = divmod(at, CHUNK_BYTES)
        length = min(CHUNK_BYTES - offset, end - at)
        yield Part(chunk, offset // WORD_BYTES, at - begin, length)
        at += length


def checksum(chunk: NDArray[np.uint8], factors: NDArray[np.uint64]) -> int:
    """Checksum of at most one chunk, as an unsigned number. Releases the GIL.

    For a part of a chunk, `factors` begin with the one of its first word.
    """
    words = chunk.view(np.uint64)
    return int(np.dot(words, factors[: len(words)]))
