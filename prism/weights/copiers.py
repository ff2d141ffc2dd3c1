"""How a piece of packed weights gets to a device: a plain copy on hosts, a copy stream on GPUs.

Both compute the checksums from the bytes that arrived, right behind each copy.
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
from prism.weights.torch_checksum import add_torch_checksums, torch_factors

_HOST_BYTES = Bytes(8 * MiB)
_CUDA_BYTES = Bytes(16 * MiB)
"""0.6 ms of a PCIe 5 link: long enough to hide what queueing one costs, short enough to change one's mind."""
_CUDA_DEPTH = 4
"""The copy thread may be away for 2 ms, while the loop holds the interpreter, before the link falls idle."""

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

    def begin(self, total: Bytes) -> Copy:
        """A new buffer of so many bytes."""
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

    def begin(self, total: Bytes) -> Copy:
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


class CudaCopier:
    """One copy stream, and one for checksums: what runs on the device does not keep the link waiting.

    What is not registered passes through a ring of pinned buffers.
    """

    def __init__(self, device: torch.device, chunk_bytes: Bytes = _CUDA_BYTES) -> None:
        """Takes `depth` chunks of pinned host memory, and one of device memory for checksums."""
        self.depth = _CUDA_DEPTH
        self.chunk_bytes = chunk_bytes
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.checking = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._ring = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(self.depth)]
        self._num_staged = 0
        with torch.cuda.stream(self.checking):
            self.factors = torch_factors(device)
            self.products = torch.empty(chunk_bytes // 8, dtype=torch.int64, device=device)

    def begin(self, total: Bytes) -> Copy:
        """See `Copier.begin`."""
        return _CudaCopy(self, total)

    def settle(self) -> None:
        """See `Copier.settle`."""
        self.stream.synchronize()
        self.checking.synchronize()

    def staged(self, source: torch.Tensor) -> torch.Tensor:
        """The bytes in pinned memory. Fewer than `depth` pieces are on their way, so a buffer is free."""
        buffer = self._ring[self._num_staged % self.depth][: source.numel()]
        self._num_staged += 1
        return buffer.copy_(source)


class _CudaCopy:
    def __init__(self, copier: CudaCopier, total: Bytes) -> None:
        self._copier = copier
        with torch.cuda.stream(copier.checking):
            self._sums = torch.zeros(num_chunks(total), dtype=torch.int64, device=copier.device)

    def copy(self, piece: Piece) -> Wait:
        """See `Copy.copy`."""
        copier = self._copier
        source = tensor_at(piece.source, (piece.size,), torch.uint8)
        if not piece.is_registered:
            source = copier.staged(source)
        target = tensor_at(piece.target, (piece.size,), torch.uint8, None, copier.device)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(copier.stream):
            target.copy_(source, non_blocking=True)
            copied = copier.stream.record_event()
        with torch.cuda.stream(copier.checking):
            copier.checking.wait_event(copied)
            add_torch_checksums(target, piece.begin, copier.factors, copier.products, self._sums)
            event.record(copier.checking)
        return event.synchronize

    def checksums(self) -> NDArray[np.uint64]:
        """See `Copy.checksums`."""
        with torch.cuda.stream(self._copier.checking):
            sums: NDArray[np.int64] = self._sums.cpu().numpy()
        return sums.view(np.uint64)
