"""The checksums of checksum.py on a GPU, of bytes that lie in slabs in any order."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from prism.types import Address, Bytes, KiB
from prism.weights.checksum import CHUNK_BYTES, WORD_BYTES, num_chunks
from prism.weights.places import Places

BLOCK_BYTES = Bytes(256 * KiB)
"""What one program adds up. Slabs and chunks are multiples of it."""
_WORDS_AT_ONCE = 2048


class DeviceChecksums:
    """Those of one buffer's bytes, as far as they were added up; all calls queue on the current stream."""

    def __init__(self, total: Bytes, places: Places, device: torch.device) -> None:
        """Of `total` bytes in these slabs."""
        assert places.slab_bytes % BLOCK_BYTES == 0, f"slabs of {places.slab_bytes} bytes"
        self._total = total
        self._slab_bytes = places.slab_bytes
        self._slabs = torch.tensor(places.slabs, dtype=torch.int64, device=device)
        blocks = num_chunks(total) * (CHUNK_BYTES // BLOCK_BYTES)
        self._sums = torch.zeros(blocks, dtype=torch.int64, device=device)
        """Of each block: no two programs add to one number."""
        self._next_block = 0

    def add_until(self, end: Bytes) -> None:
        """Add all whole blocks up to this byte that were not added before, and at the end what is left."""
        until = -(-end // BLOCK_BYTES) if end == self._total else end // BLOCK_BYTES
        if until > self._next_block:
            last = (self._total - 1) // BLOCK_BYTES
            _add_up[(until - self._next_block,)](
                self._slabs,
                self._sums,
                self._next_block,
                last,
                (self._total - last * BLOCK_BYTES) // WORD_BYTES,
                self._slab_bytes // WORD_BYTES,
                CHUNK_WORDS=CHUNK_BYTES // WORD_BYTES,
                BLOCK_WORDS=BLOCK_BYTES // WORD_BYTES,
                AT_ONCE=_WORDS_AT_ONCE,
                num_warps=8,
            )
            self._next_block = until

    def result(self) -> NDArray[np.uint64]:
        """One number a chunk, once everything was added; waits for the device."""
        by_chunk = self._sums.view(-1, CHUNK_BYTES // BLOCK_BYTES)
        sums: NDArray[np.int64] = by_chunk.sum(dim=1).cpu().numpy()
        return sums.view(np.uint64)


def warm_up(device: torch.device) -> None:
    """Have the kernel there: the first load would wait until it is compiled."""
    slab = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device)
    sums = DeviceChecksums(BLOCK_BYTES, Places((Address(slab.data_ptr()),), BLOCK_BYTES), device)
    sums.add_until(BLOCK_BYTES)
    sums.result()


@triton.jit(do_not_specialize=["first_block", "last_block", "last_words", "slab_words"])
def _add_up(
    slabs, sums, first_block, last_block, last_words, slab_words,
    CHUNK_WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    block = first_block + tl.program_id(0).to(tl.int64)
    begin = block * BLOCK_WORDS
    words = tl.load(slabs + begin // slab_words).to(tl.pointer_type(tl.int64)) + begin % slab_words
    lanes = tl.arange(0, AT_ONCE)
    num_words = tl.where(block == last_block, last_words, BLOCK_WORDS)
    total = tl.zeros((AT_ONCE,), tl.int64)
    for at in range(0, BLOCK_WORDS, AT_ONCE):
        word = tl.load(words + at + lanes, mask=at + lanes < num_words, other=0)
        total += word * (2 * (begin % CHUNK_WORDS + at + lanes) + 1)
    tl.store(sums + block, tl.sum(total))
