"""Host memory for the KV tier, taken chunk by chunk beside the loop when it is wanted.

    asked for ──available?──> pages taken, mapped ──GPUs: registered piece by piece──> ready
                     '─ no, or the driver refuses ──> said once; no more are made

All chunks lie side by side in one range of addresses. On GPUs they are registered with CUDA in small pieces
with rests between, so that launches of the loop do not wait (see weights/registrations.py).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Protocol

from prism.errors import DriverError, HostMemoryError, PrismError
from prism.memory import memfd
from prism.memory.available import available_memory
from prism.types import Address, Bytes
from prism.weights.registrations import PAUSE, REGISTER_BYTES, Pinner

log = logging.getLogger(__name__)


class Chunks(Protocol):
    """Where the tier's memory comes from."""

    chunk_bytes: Bytes
    max_chunks: int
    base: Address
    """Chunk i lies at `base + i * chunk_bytes`."""
    piece_bytes: Bytes
    """No copy may cross a border between pieces of this size, counted from `base`."""
    num_ready: int
    """Only grows."""
    error: str | None
    """Why no more of them come."""

    def ask(self, count: int) -> None:
        """So many in all are wanted; returns at once."""
        ...


class HostChunks:
    """See the module's docstring. `make` belongs to one thread."""

    def __init__(self, chunk_bytes: Bytes, max_chunks: int, pinner: Pinner | None) -> None:
        """Takes addresses only."""
        self.chunk_bytes = chunk_bytes
        self.max_chunks = max_chunks
        self.piece_bytes = min(chunk_bytes, REGISTER_BYTES)
        self.base = memfd.reserve_addresses(Bytes(chunk_bytes * max_chunks))
        self.num_ready = 0
        self.error: str | None = None
        self.num_wanted = 0
        self.wake = threading.Event()
        self._pinner = pinner
        self._fd = memfd.create_memfd("prism-kv")

    def ask(self, count: int) -> None:
        """See `Chunks.ask`."""
        if count > self.num_wanted:
            self.num_wanted = min(count, self.max_chunks)
            self.wake.set()

    def make(self) -> bool:
        """Make one more chunk, if one is wanted; whether there was anything to do."""
        if self.num_ready >= self.num_wanted or self.error is not None:
            return False
        try:
            self._take(self.num_ready)
        except (OSError, PrismError) as error:
            self.error = str(error)
            log.error("no more host memory for KV, what has no place there is computed again: %s", error)
            return True
        self.num_ready += 1
        return True

    def _take(self, number: int) -> None:
        offset = number * self.chunk_bytes
        if self.chunk_bytes > available_memory():
            raise HostMemoryError(f"the machine has less than {self.chunk_bytes} bytes left")
        memfd.allocate(self._fd, offset, self.chunk_bytes)
        address = Address(self.base + offset)
        try:
            memfd.map_file(address, self.chunk_bytes, self._fd, offset)
            if self._pinner is not None:
                _register(self._pinner, address, self.chunk_bytes)
        except (OSError, PrismError):
            memfd.unmap_file(address, self.chunk_bytes)
            memfd.punch_hole(self._fd, offset, self.chunk_bytes)
            raise

    def close(self) -> None:
        """Give everything back; no copy is under way and nobody makes chunks any more."""
        if self._pinner is not None:
            for number in range(self.num_ready):
                for begin in _pieces(self.chunk_bytes):
                    address = Address(self.base + number * self.chunk_bytes + begin)
                    self._pinner.unregister_host(address)
        memfd.unreserve_addresses(self.base, Bytes(self.chunk_bytes * self.max_chunks))
        os.close(self._fd)


def _pieces(size: Bytes) -> range:
    """Where each registration begins; a chunk, a power of two, is one or several of them."""
    return range(0, size, REGISTER_BYTES)


def _register(pinner: Pinner, address: Address, size: Bytes) -> None:
    """All of it, or nothing."""
    done: list[Address] = []
    try:
        for begin in _pieces(size):
            start = time.monotonic()
            place, length = Address(address + begin), Bytes(min(REGISTER_BYTES, size - begin))
            memfd.touch(place, length, writable=True)
            pinner.register_host(place, length)
            done.append(place)
            time.sleep(PAUSE * (time.monotonic() - start))
    except DriverError:
        for place in done:
            pinner.unregister_host(place)
        raise


class ChunkThread:
    """Makes chunks while any are wanted, and sleeps otherwise."""

    def __init__(self, chunks: HostChunks) -> None:
        self._chunks = chunks
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-chunks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; the memory goes with the process."""
        self._is_closing = True
        self._chunks.wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing:
            self._chunks.wake.clear()
            if not self._chunks.make():
                self._chunks.wake.wait()
