"""A range of addresses that never changes, where one model's weights appear while it is active.

CUDA graphs hold addresses, so the range is reserved for as long as the model is known. The physical memory
comes and goes: slabs of the pool, mapped here a second time. After an eviction a slab may be shown here for a
while although it is another's already, even in that one's arena; it does no harm, since nobody reads it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from prism.errors import DriverError, StillMapped
from prism.memory.driver import Driver, Handle
from prism.types import Address, Bytes

_AT_ONCE = 8
"""Slabs mapped in one call: it takes up to 0.4 ms, in which nobody else gets into the driver."""


class Arena:
    """Consecutive addresses for `size` bytes, rounded up to whole slabs."""

    def __init__(self, driver: Driver, size: Bytes, slab_bytes: Bytes) -> None:
        """Reserve the addresses; raises `DriverError`."""
        self._driver = driver
        self._slab_bytes = slab_bytes
        self._num_mapped = 0
        self.num_slabs = -(-size // slab_bytes)
        self.base = driver.reserve(self.size)

    @property
    def size(self) -> Bytes:
        """Bytes of addresses, whole slabs."""
        return Bytes(self.num_slabs * self._slab_bytes)

    @property
    def is_mapped(self) -> bool:
        """Whether all of the range can be read and written."""
        return self._num_mapped == self.num_slabs

    @property
    def is_empty(self) -> bool:
        """Whether no memory is mapped at all: only then it may be mapped again."""
        return self._num_mapped == 0

    def map(self, handles: Sequence[Handle]) -> None:
        """Put `num_slabs` slabs behind the range, in this order.

        Raises `DriverError` when the device refuses, with nothing left mapped (or, if the device refuses
        that as well, with `is_empty` still false: then `unmap` is to be tried again).
        """
        assert self.is_empty, "the arena has memory already"
        assert len(handles) == self.num_slabs, f"{len(handles)} slabs for {self.num_slabs}"
        try:
            for some in (handles[i : i + _AT_ONCE] for i in range(0, len(handles), _AT_ONCE)):
                self._driver.map(self._address(self._num_mapped), *some)
                self._num_mapped += len(some)
        except DriverError as error:
            if isinstance(error, StillMapped):
                self._num_mapped += error.num_handles
            with suppress(DriverError):
                self.unmap()
            raise

    def unmap(self) -> None:
        """Take the slabs away, the last one first; nothing queued on the device may use them.

        Raises `DriverError` when the device refuses; calling again goes on where it stopped.
        """
        while self._num_mapped:
            self._driver.unmap(self._address(self._num_mapped - 1), self._slab_bytes)
            self._num_mapped -= 1

    def close(self) -> None:
        """Give the addresses back, unmapping first what is mapped; raises `DriverError`."""
        self.unmap()
        self._driver.unreserve(self.base, self.size)

    def _address(self, index: int) -> Address:
        return Address(self.base + index * self._slab_bytes)
