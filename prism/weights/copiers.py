"""How a chunk of packed weights gets to a device: a plain copy on hosts, a copy stream on GPUs.

Both compute the checksums from the bytes that arrived, right behind each copy.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prism.memory.tensors import tensor_at
from prism.types import Bytes
from prism.weights.checksum import CHUNK_BYTES, checksum, factors, num_chunks
from prism.weights.client import PackedWeights
from prism.weights.torch_checksum import torch_checksums, torch_factors

_NUM_BUFFERS = 2


class Copier(Protocol):
    """Chunks are copied in order; bounds are multiples of the checksums' chunks, but for the last end."""

    def copy(self, begin: Bytes, end: Bytes) -> Bytes:
        """Copy `[begin, end)`, perhaps only queueing it; returns how many bytes have surely arrived."""
        ...

    def drain(self) -> None:
        """Wait until nothing is queued."""
        ...

    def checksums(self) -> NDArray[np.uint64]:
        """Those of the bytes that arrived, after `drain`."""
        ...


class HostCopier:
    """Memory to memory; numpy releases the GIL for both the copy and the checksum."""

    def __init__(self, packed: PackedWeights, target: torch.Tensor) -> None:
        self._source = packed.data
        self._target = target.numpy()
        self._factors = factors()
        self._sums = np.zeros(num_chunks(packed.total_bytes), np.uint64)

    def copy(self, begin: Bytes, end: Bytes) -> Bytes:
        """See `Copier.copy`; checksum chunk by checksum chunk, while it is in the cache."""
        for index in range(begin // CHUNK_BYTES, num_chunks(end)):
            part = slice(index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, end))
            np.copyto(self._target[part], self._source[part])
            self._sums[index] = checksum(self._target[part], self._factors)
        return end

    def drain(self) -> None:
        """See `Copier.drain`: nothing is ever queued. The packed weights are not held any longer."""
        del self._source

    def checksums(self) -> NDArray[np.uint64]:
        """See `Copier.checksums`."""
        return self._sums


class _Flight(NamedTuple):
    """A queued copy that ends at byte `end`."""

    end: Bytes
    event: torch.cuda.Event


class CudaCopier:
    """At most two chunks in flight on a stream of its own, through pinned buffers unless that is needless."""

    def __init__(
        self, packed: PackedWeights, target: torch.Tensor, chunk_bytes: Bytes, *, source_is_pinned: bool
    ) -> None:
        self._source = tensor_at(packed.address, (packed.total_bytes,), torch.uint8)
        self._target = target
        self._stream = torch.cuda.Stream(target.device)  # type: ignore[no-untyped-call]
        self._flights: deque[_Flight] = deque()
        self._buffers = None if source_is_pinned else _pinned_buffers(chunk_bytes)
        self._num_copies = 0
        with torch.cuda.stream(self._stream):
            self._factors = torch_factors(target.device)
            self._sums = torch.zeros(num_chunks(packed.total_bytes), dtype=torch.int64, device=target.device)

    def copy(self, begin: Bytes, end: Bytes) -> Bytes:
        """See `Copier.copy`."""
        arrived = self._wait_for_oldest() if len(self._flights) == _NUM_BUFFERS else Bytes(0)
        source = self._staged(self._source[begin:end])
        target = self._target[begin:end]
        sums = self._sums[begin // CHUNK_BYTES : num_chunks(end)]
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            torch_checksums(target, self._factors, sums)
            event.record(self._stream)
        self._flights.append(_Flight(end, event))
        return arrived

    def drain(self) -> None:
        """See `Copier.drain`."""
        self._stream.synchronize()
        self._flights.clear()

    def checksums(self) -> NDArray[np.uint64]:
        """See `Copier.checksums`."""
        sums: NDArray[np.int64] = self._sums.cpu().numpy()
        return sums.view(np.uint64)

    def _staged(self, source: torch.Tensor) -> torch.Tensor:
        """The bytes in pinned memory; the buffer's previous copy has been waited for."""
        if self._buffers is None:
            return source
        buffer = self._buffers[self._num_copies % _NUM_BUFFERS][: source.numel()]
        self._num_copies += 1
        return buffer.copy_(source)

    def _wait_for_oldest(self) -> Bytes:
        flight = self._flights.popleft()
        flight.event.synchronize()
        return flight.end


def _pinned_buffers(size: Bytes) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_BUFFERS))
