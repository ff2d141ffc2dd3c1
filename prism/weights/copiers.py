"""How pieces of packed weights get to a device. On hosts it is a plain copy; for GPUs see cuda_copier.py.

Checksums are those of the bytes that arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prism.memory.tensors import tensor_at
from prism.types import Address, Bytes, MiB
from prism.weights.checksum import checksum, factors, num_chunks, parts
from prism.weights.places import Places

_HOST_BYTES = Bytes(8 * MiB)

Wait = Callable[[], None]
"""Returns once a piece has arrived."""


class Piece(NamedTuple):
    """Bytes `begin` to `begin + size` of packed weights, and where they go."""

    source: Address
    is_registered: bool
    """The source is registered with CUDA."""
    begin: Bytes
    size: Bytes
    target: Address


class Copy(Protocol):
    """One buffer's way to the device, piece by piece in order."""

    def copy(self, piece: Piece) -> Wait:
        """Copy a piece, perhaps only queueing it behind all earlier ones of this copier."""
        ...

    def checksums(self) -> NDArray[np.uint64]:
        """Those of what arrived, once all pieces have been waited for."""
        ...


class Copier(Protocol):
    """A device's way in. One thread uses it, and waits for the oldest piece once `depth` are on their way."""

    depth: int
    chunk_bytes: Bytes
    """Largest piece; a power of two."""

    def begin(self, total: Bytes, places: Places) -> Copy:
        """A new buffer of so many bytes, and where all of it is going to be."""
        ...

    def settle(self) -> None:
        """Return once nothing is on its way, whatever failed while it was queued."""
        ...


class HostCopier:
    """Memory to memory; numpy releases the GIL for both the copy and the checksum."""

    def __init__(self, chunk_bytes: Bytes = _HOST_BYTES) -> None:
        self.depth = 1
        self.chunk_bytes = chunk_bytes
        self._factors = factors()

    def begin(self, total: Bytes, places: Places) -> Copy:
        """See `Copier.begin`."""
        return _HostCopy(self._factors, total)

    def settle(self) -> None:
        """See `Copier.settle`: copies are done when they return."""


class _HostCopy:
    def __init__(self, factors: NDArray[np.uint64], total: Bytes) -> None:
        self._factors = factors
        self._sums = np.zeros(num_chunks(total), np.uint64)

    def copy(self, piece: Piece) -> Wait:
        """Part by part, so that the checksum finds in the cache what was copied."""
        source = tensor_at(piece.source, (piece.size,), torch.uint8).numpy()
        target = tensor_at(piece.target, (piece.size,), torch.uint8).numpy()
        for part in parts(piece.begin, piece.size):
            here = slice(part.begin, part.begin + part.size)
            np.copyto(target[here], source[here])
            self._sums[part.chunk : part.chunk + 1] += np.uint64(
                checksum(target[here], self._factors[part.first_word :])
            )
        return lambda: None

    def checksums(self) -> NDArray[np.uint64]:
        """See `Copy.checksums`."""
        return self._sums
