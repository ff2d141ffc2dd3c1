"""How pieces of packed weights get to a GPU; imported for such a device only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prism.memory.cuda_calls import CudaCalls, Mark
from prism.memory.tensors import tensor_at
from prism.types import Address, Bytes, MiB
from prism.weights.copiers import Copy, Piece, Wait
from prism.weights.cuda_checksum import DeviceChecksums, warm_up
from prism.weights.places import Places

_PIECE_BYTES = Bytes(16 * MiB)
"""0.3 ms of a PCIe 5 link."""
_DEPTH = 8
"""The copy thread may be away for 2 ms, while the loop has the interpreter, before the link falls idle.

What becomes urgent waits for as long.
"""
_NUM_STAGED = 4
_CHECKED_AT_ONCE = Bytes(128 * MiB)
"""Launching a kernel takes as long as queueing several copies."""


class _Buffer(NamedTuple):
    """Pinned memory, in use until the mark has been passed."""

    memory: torch.Tensor
    mark: Mark


class CudaCopier:
    """One copy stream, and one for checksums: what runs on the device does not keep the link waiting.

    What is not registered passes through a ring of pinned buffers.
    """

    def __init__(self, device: torch.device, chunk_bytes: Bytes = _PIECE_BYTES) -> None:
        """Takes four chunks of pinned host memory."""
        self.depth = _DEPTH
        self.chunk_bytes = chunk_bytes
        self.device = device
        self.calls = CudaCalls()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.checking = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._marks = [self.calls.mark() for _ in range(self.depth)]
        self._num_queued = 0
        self._ring = [
            _Buffer(torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True), self.calls.mark())
            for _ in range(_NUM_STAGED)
        ]
        self._num_staged = 0
        with torch.cuda.stream(self.checking):
            warm_up(device)

    def begin(self, total: Bytes, places: Places) -> Copy:
        """See `Copier.begin`. The thread has the device's context from now on."""
        torch.cuda.set_device(self.device)
        return _CudaCopy(self, total, places)

    def settle(self) -> None:
        """See `Copier.settle`."""
        self.stream.synchronize()
        self.checking.synchronize()

    def queue(self, piece: Piece) -> Mark:
        """Behind all pieces before; the mark is passed when it has arrived. `depth` marks are there."""
        mark = self._marks[self._num_queued % self.depth]
        stream = self.stream.cuda_stream
        if piece.is_registered:
            self.calls.copy(piece.target, piece.source, piece.size, stream)
        else:
            buffer = self._staged(piece)
            self.calls.copy(piece.target, Address(buffer.memory.data_ptr()), piece.size, stream)
            buffer.mark.set(stream)
        mark.set(stream)
        self._num_queued += 1
        return mark

    def _staged(self, piece: Piece) -> _Buffer:
        buffer = self._ring[self._num_staged % _NUM_STAGED]
        self._num_staged += 1
        buffer.mark.wait()
        buffer.memory[: piece.size].copy_(tensor_at(piece.source, (piece.size,), torch.uint8))
        return buffer


class _CudaCopy:
    def __init__(self, copier: CudaCopier, total: Bytes, places: Places) -> None:
        self._copier = copier
        self._total = total
        self._checked = Bytes(0)
        with torch.cuda.stream(copier.checking):
            self._sums = DeviceChecksums(total, places, copier.device)

    def copy(self, piece: Piece) -> Wait:
        """See `Copy.copy`."""
        mark = self._copier.queue(piece)
        end = Bytes(piece.begin + piece.size)
        if end == self._total or end - self._checked >= _CHECKED_AT_ONCE:
            self._check(end, mark)
        return mark.wait

    def _check(self, end: Bytes, mark: Mark) -> None:
        checking = self._copier.checking
        self._copier.calls.wait_for(checking.cuda_stream, mark)
        with torch.cuda.stream(checking):
            self._sums.add_until(end)
        self._checked = end

    def checksums(self) -> NDArray[np.uint64]:
        """See `Copy.checksums`."""
        with torch.cuda.stream(self._copier.checking):
            return self._sums.result()
