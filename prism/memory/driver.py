"""The few calls that physical memory and virtual addresses need, the same for every kind of device.

    reserve ── addresses without memory ──┐
                                          ├── map ──> memory at addresses ── unmap ──> both apart again
    create ─── memory without addresses ──┘

One handle may be mapped at several addresses at once, in a window and in any number of arenas: writes through
one are read through the others. It is released when it is mapped nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NewType, Protocol

from prism.errors import DriverError, StillMapped
from prism.types import Address, Bytes

Handle = NewType("Handle", int)
"""A piece of physical memory, as large as it was created."""


class MemoryInfo(NamedTuple):
    """What the device itself says about its memory."""

    free: Bytes
    total: Bytes


class Driver(Protocol):
    """Every method raises `DriverError(call, code)` when the device refuses, and then has changed nothing,
    unless `map` says what it has.

    Addresses and sizes are multiples of `granularity`. Calls may come from several threads; none waits for
    work that is queued on the device, so whoever unmaps memory makes sure first that no such work uses it.
    """

    @property
    def granularity(self) -> Bytes:
        """Smallest unit of addresses and sizes."""
        ...

    def reserve(self, size: Bytes) -> Address:
        """Take a range of addresses that nothing else will use; no memory is behind it yet."""
        ...

    def unreserve(self, address: Address, size: Bytes) -> None:
        """Give a whole range back; nothing may be mapped in it."""
        ...

    def create(self, size: Bytes) -> Handle:
        """Take physical memory. Its content is undefined."""
        ...

    def release(self, handle: Handle) -> None:
        """Give physical memory back to the system; it may be mapped nowhere."""
        ...

    def map(self, address: Address, *handles: Handle) -> None:
        """Put whole handles at `address`, one behind the other, in one reserved range, to read and write.

        Raises `StillMapped` if the device refuses some, and then to take the others away.
        """
        ...

    def unmap(self, address: Address, size: Bytes) -> None:
        """Take away what is mapped in the range, whole handles only; the addresses stay reserved."""
        ...

    def memory_info(self) -> MemoryInfo:
        """Free and total memory of the device."""
        ...

    def close(self) -> None:
        """End the driver; everything it gave out has been given back."""
        ...


def undone(error: DriverError, num_mapped: int, unmap: Callable[[], None]) -> DriverError:
    """What `map` raises for `error`, once the handles that it has mapped are taken away, if they can be."""
    try:
        if num_mapped:
            unmap()
    except DriverError:
        return StillMapped(error, num_mapped)
    return error
