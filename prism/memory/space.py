"""Accounting of reserved addresses, handles and mappings, and the rules that a driver's callers keep.

Who breaks a rule has a bug, so the rules are assertions: a broken one could overwrite any memory of the
process (`MAP_FIXED`) or leave a device reading what is gone. Pure bookkeeping, safe to call from threads.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from threading import Lock
from typing import NamedTuple

from prism.memory.driver import Handle
from prism.types import Address, Bytes


class Piece(NamedTuple):
    """Part of a handle that is mapped, as seen through a range of addresses."""

    handle: Handle
    offset: Bytes
    size: Bytes


class AddressSpace:
    """What one driver has given out."""

    def __init__(self, granularity: Bytes) -> None:
        self._granularity = granularity
        self._lock = Lock()
        self._reserved: dict[Address, Bytes] = {}
        self._sizes: dict[Handle, Bytes] = {}
        self._mapped: dict[Address, Handle] = {}
        self._starts: list[Address] = []  # keys of _mapped, sorted
        self._num_maps: dict[Handle, int] = {}

    @property
    def handle_bytes(self) -> Bytes:
        """Physical memory of all handles together."""
        with self._lock:
            return Bytes(sum(self._sizes.values()))

    def size_of(self, handle: Handle) -> Bytes:
        """How large a handle is."""
        with self._lock:
            assert handle in self._sizes, f"unknown handle {handle}"
            return self._sizes[handle]

    # --- handles -----------------------------------------------------------------------------------

    def add_handle(self, handle: Handle, size: Bytes) -> None:
        """A handle was created."""
        self.check_size(size)
        with self._lock:
            assert handle not in self._sizes, f"handle {handle} exists"
            self._sizes[handle], self._num_maps[handle] = size, 0

    def remove_handle(self, handle: Handle) -> Bytes:
        """A handle is released; returns its size."""
        with self._lock:
            assert handle in self._sizes, f"unknown handle {handle}"
            assert not self._num_maps[handle], f"handle {handle} is still mapped"
            del self._num_maps[handle]
            return self._sizes.pop(handle)

    # --- reserved ranges ---------------------------------------------------------------------------

    def add_range(self, address: Address, size: Bytes) -> None:
        """A range was reserved."""
        self.check_size(size)
        with self._lock:
            assert address % self._granularity == 0, f"address {address:#x} is not aligned"
            assert address not in self._reserved, f"range at {address:#x} is reserved already"
            self._reserved[address] = size

    def remove_range(self, address: Address, size: Bytes) -> None:
        """A range is given back, whole and empty."""
        with self._lock:
            assert self._reserved.get(address) == size, f"no range of {size} bytes at {address:#x}"
            assert not self._overlapping(address, size), f"range at {address:#x} has memory mapped in it"
            del self._reserved[address]

    # --- mappings ----------------------------------------------------------------------------------

    def add_map(self, address: Address, handle: Handle) -> Bytes:
        """A handle is mapped at `address`; returns its size."""
        with self._lock:
            assert handle in self._sizes, f"unknown handle {handle}"
            size = self._sizes[handle]
            assert address % self._granularity == 0, f"address {address:#x} is not aligned"
            assert self._is_reserved(address, size), f"{size} bytes at {address:#x} are not reserved"
            assert not self._overlapping(address, size), f"memory is mapped at {address:#x} already"
            self._mapped[address] = handle
            self._num_maps[handle] += 1
            insort(self._starts, address)
            return size

    def remove_maps(self, address: Address, size: Bytes) -> tuple[Handle, ...]:
        """All handles in the range are unmapped, without gaps and none cut in two; returns them in order."""
        with self._lock:
            handles, at = [], address
            while at < address + size:
                assert at in self._mapped, f"nothing is mapped at {at:#x}, or it begins before"
                handles.append(self._mapped[at])
                at = Address(at + self._sizes[handles[-1]])
            assert at == address + size, f"a handle reaches past {address + size:#x}"
            first = bisect_left(self._starts, address)
            for start in self._starts[first : first + len(handles)]:
                self._num_maps[self._mapped.pop(start)] -= 1
            del self._starts[first : first + len(handles)]
            return tuple(handles)

    def pieces(self, address: Address, size: Bytes) -> tuple[Piece, ...]:
        """The memory behind any range of addresses, all of which must be mapped."""
        with self._lock:
            found, at, end = [], address, address + size
            while at < end:
                index = bisect_right(self._starts, at) - 1
                assert index >= 0, f"nothing is mapped at {at:#x}"
                start = self._starts[index]
                handle = self._mapped[start]
                stop = min(start + self._sizes[handle], end)
                assert at < stop, f"nothing is mapped at {at:#x}"
                found.append(Piece(handle, Bytes(at - start), Bytes(stop - at)))
                at = Address(stop)
            return tuple(found)

    # --- rules -------------------------------------------------------------------------------------

    def check_size(self, size: Bytes) -> None:
        """Sizes are positive multiples of the granularity."""
        assert size > 0 and size % self._granularity == 0, f"{size} is not a multiple of {self._granularity}"

    def check_empty(self) -> None:
        """Everything has been given back: nothing leaks when the driver closes."""
        with self._lock:
            assert not self._mapped, f"still mapped: {[hex(a) for a in self._starts]}"
            assert not self._sizes, f"not released: {list(self._sizes)}"
            assert not self._reserved, f"still reserved: {[hex(a) for a in self._reserved]}"

    def _is_reserved(self, address: Address, size: Bytes) -> bool:
        return any(
            start <= address and address + size <= start + length for start, length in self._reserved.items()
        )

    def _overlapping(self, address: Address, size: Bytes) -> bool:
        index = bisect_left(self._starts, address)
        if index < len(self._starts) and self._starts[index] < address + size:
            return True
        if index == 0:
            return False
        before = self._starts[index - 1]
        return before + self._sizes[self._mapped[before]] > address
