"""A driver whose chosen calls fail: the same faults, at the same places, around any other driver."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from prism.errors import DriverError
from prism.memory.driver import Driver, Handle, MemoryInfo
from prism.types import Address, Bytes


class FaultPlan:
    """Counts calls from 1 and fails the chosen ones before they do anything."""

    def __init__(self, fail_at: int | Collection[int] | None = None) -> None:
        self.num_calls = 0
        self._is_paused = False
        self.set(fail_at)

    def set(self, fail_at: int | Collection[int] | None) -> None:
        """Fail these calls, numbered from the first call ever; None fails none."""
        self._fail_at = frozenset() if fail_at is None else frozenset(_numbers(fail_at))

    def fail_next(self, number: int = 1) -> None:
        """Fail the `number`-th call from now."""
        self.set(self.num_calls + number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls made inside are not counted and do not fail."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def count(self, call: str) -> None:
        """One more call; raises `DriverError` if it is to fail."""
        if self._is_paused:
            return
        self.num_calls += 1
        if self.num_calls in self._fail_at:
            raise DriverError(call, "injected")


def _numbers(fail_at: int | Collection[int]) -> Collection[int]:
    return (fail_at,) if isinstance(fail_at, int) else fail_at


class FailingDriver:
    """`inner`, with faults. `granularity` and `close` are not counted."""

    def __init__(self, inner: Driver, fail_at: int | Collection[int] | None = None) -> None:
        self.inner = inner
        self.faults = FaultPlan(fail_at)

    @property
    def granularity(self) -> Bytes:
        """See `Driver.granularity`."""
        return self.inner.granularity

    def reserve(self, size: Bytes) -> Address:
        """See `Driver.reserve`."""
        self.faults.count("reserve")
        return self.inner.reserve(size)

    def unreserve(self, address: Address, size: Bytes) -> None:
        """See `Driver.unreserve`."""
        self.faults.count("unreserve")
        self.inner.unreserve(address, size)

    def create(self, size: Bytes) -> Handle:
        """See `Driver.create`."""
        self.faults.count("create")
        return self.inner.create(size)

    def release(self, handle: Handle) -> None:
        """See `Driver.release`."""
        self.faults.count("release")
        self.inner.release(handle)

    def map(self, address: Address, *handles: Handle) -> None:
        """See `Driver.map`. Each handle counts: any of them may be the one that is refused."""
        for _ in handles:
            self.faults.count("map")
        self.inner.map(address, *handles)

    def unmap(self, address: Address, size: Bytes) -> None:
        """See `Driver.unmap`."""
        self.faults.count("unmap")
        self.inner.unmap(address, size)

    def memory_info(self) -> MemoryInfo:
        """See `Driver.memory_info`."""
        self.faults.count("memory_info")
        return self.inner.memory_info()

    def close(self) -> None:
        """See `Driver.close`."""
        self.inner.close()
