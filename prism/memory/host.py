"""Memory of the machine itself, with the same calls as a GPU's: real pages that really go back to the system.

All handles are places in one memory file. A place is never used twice: the file is sparse, so a fresh place
costs nothing and the file cannot fragment.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from prism.errors import DriverError
from prism.memory import memfd
from prism.memory.available import available_memory
from prism.memory.driver import Handle, MemoryInfo, undone
from prism.memory.space import AddressSpace
from prism.types import Address, Bytes


class HostDriver:
    """A driver over `capacity` bytes of host memory; a handle is its offset in the memory file."""

    def __init__(self, capacity: Bytes) -> None:
        self._capacity = capacity
        self._fd = memfd.create_memfd("prism-slabs")
        self._space = AddressSpace(self.granularity)
        self._lock = Lock()
        self._next_offset = 0

    @property
    def granularity(self) -> Bytes:
        """The page size."""
        return Bytes(mmap.PAGESIZE)

    def reserve(self, size: Bytes) -> Address:
        """See `Driver.reserve`."""
        self._space.check_size(size)
        with _driver_errors("reserve"):
            address = memfd.reserve_addresses(size)
        self._space.add_range(address, size)
        return address

    def unreserve(self, address: Address, size: Bytes) -> None:
        """See `Driver.unreserve`."""
        self._space.remove_range(address, size)
        try:
            with _driver_errors("unreserve"):
                memfd.unreserve_addresses(address, size)
        except DriverError:
            self._space.add_range(address, size)
            raise

    def create(self, size: Bytes) -> Handle:
        """Take pages at once: a shortage is an error here and no fatal signal later.

        Raises `DriverError` with ENOSPC past the capacity and with ENOMEM when the machine, or a control
        group that the process is in, has less memory left.
        """
        handle = self._place(size)
        try:
            with _driver_errors("create"):
                if size > available_memory():
                    raise OSError(errno.ENOMEM, "less memory is available")
                memfd.allocate(self._fd, handle, size)
        except DriverError:
            self._space.remove_handle(handle)
            raise
        return handle

    def _place(self, size: Bytes) -> Handle:
        """A fresh place in the file, counted against the capacity."""
        self._space.check_size(size)
        with self._lock:
            if self._space.handle_bytes + size > self._capacity:
                raise DriverError("create", "ENOSPC")
            handle = Handle(self._next_offset)
            self._next_offset += size
            self._space.add_handle(handle, size)
            return handle

    def release(self, handle: Handle) -> None:
        """See `Driver.release`; the pages go back to the system at once."""
        size = self._space.remove_handle(handle)
        try:
            with _driver_errors("release"):
                memfd.punch_hole(self._fd, handle, size)
        except DriverError:
            self._space.add_handle(handle, size)
            raise

    def map(self, address: Address, *handles: Handle) -> None:
        """See `Driver.map`."""
        num_mapped, end = 0, address
        try:
            for handle in handles:
                end = Address(end + self._map_one(end, handle))
                num_mapped += 1
        except DriverError as error:
            raise undone(error, num_mapped, lambda: self.unmap(address, Bytes(end - address))) from error

    def _map_one(self, address: Address, handle: Handle) -> Bytes:
        size = self._space.add_map(address, handle)
        try:
            with _driver_errors("map"):
                memfd.map_file(address, size, self._fd, handle)
        except DriverError:
            self._space.remove_maps(address, size)
            raise
        return size

    def unmap(self, address: Address, size: Bytes) -> None:
        """See `Driver.unmap`."""
        handles = self._space.remove_maps(address, size)
        try:
            with _driver_errors("unmap"):
                memfd.unmap_file(address, size)
        except DriverError:
            for handle in handles:
                address = Address(address + self._space.add_map(address, handle))
            raise

    def memory_info(self) -> MemoryInfo:
        """The capacity, and what of it has no pages behind it (asked of the system, not counted)."""
        with _driver_errors("memory_info"):
            used = memfd.allocated_bytes(self._fd)
        return MemoryInfo(Bytes(self._capacity - used), Bytes(self._capacity))

    def close(self) -> None:
        """See `Driver.close`."""
        self._space.check_empty()
        os.close(self._fd)


@contextmanager
def _driver_errors(call: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DriverError(call, errno.errorcode.get(error.errno or 0, error.errno or 0)) from error
