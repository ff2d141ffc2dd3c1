from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prism.types import Bytes
from prism.weights.checksum import CHUNK_BYTES, checksum, factors, num_chunks, parts, table_bytes

FACTORS = factors()
CHUNK = np.random.default_rng(0).integers(0, 256, CHUNK_BYTES, np.uint8)


def of_all(data: NDArray[np.uint8]) -> list[int]:
    return [checksum(data[i : i + CHUNK_BYTES], FACTORS) for i in range(0, len(data), CHUNK_BYTES)]


def test_it_is_what_it_says() -> None:
    words = CHUNK[:800].view(np.uint64)
    assert checksum(CHUNK[:800], FACTORS) == sum(int(w) * (2 * i + 1) for i, w in enumerate(words)) % 2**64


@settings(max_examples=100)
@given(st.integers(0, CHUNK_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(place: int, change: int) -> None:
    whole = checksum(CHUNK, FACTORS)
    CHUNK[place] ^= change
    try:
        assert checksum(CHUNK, FACTORS) != whole
    finally:
        CHUNK[place] ^= change


@given(st.integers(0, 511), st.integers(0, 63))
def test_any_changed_bit_is_noticed_in_the_simplest_data_too(place: int, bit: int) -> None:
    words = np.zeros(512, np.uint64)
    words[place] = np.uint64(1) << np.uint64(bit)
    assert checksum(words.view(np.uint8), FACTORS) != 0


def test_exchanged_and_moved_words_are_noticed() -> None:
    words = CHUNK.view(np.uint64)[:1000].copy()
    whole = checksum(words.view(np.uint8), FACTORS)
    exchanged = words.copy()
    exchanged[[3, 700]] = words[[700, 3]]
    for changed in (exchanged, np.roll(words, 1)):
        assert checksum(changed.view(np.uint8), FACTORS) != whole


@settings(max_examples=30)
@given(st.sets(st.integers(1, 3 * CHUNK_BYTES // 8), max_size=6))
def test_pieces_add_up_wherever_they_are_cut(cuts: set[int]) -> None:
    """Slabs may be smaller than a checksum's chunk."""
    size = 3 * CHUNK_BYTES + 800
    data = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    ends = sorted({8 * cut for cut in cuts} | {size})
    sums = [0] * num_chunks(Bytes(size))
    for begin, end in pairwise([0, *ends]):
        piece = data[begin:end]
        for part in parts(Bytes(begin), Bytes(end - begin)):
            words = piece[part.begin : part.begin + part.size]
            sums[part.chunk] += checksum(words, FACTORS[part.first_word :])
    assert [value % 2**64 for value in sums] == of_all(data)


def test_the_table_has_a_word_per_chunk() -> None:
    assert [table_bytes(Bytes(n)) for n in (1, CHUNK_BYTES, CHUNK_BYTES + 1)] == [8, 8, 16]
