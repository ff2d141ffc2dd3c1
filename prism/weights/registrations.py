"""Keeps packed weights of likely models registered with CUDA, so that copies from them run at full speed.

    announced ──within budget, likely ones first──> borrowed ──chunk by chunk──> registered
        ^                                                                            |
        └──── given back: unlikely now, or the store recalls it; never while a load uses it

Registering costs 0.07 s/GiB, so it runs ahead of time on a thread of its own (`RegistrationThread`), in calls
that release the GIL. A load uses what is registered: all of a model, the beginning of it, or nothing.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from prism.errors import DriverError, HostMemoryError
from prism.memory import memfd
from prism.types import Address, Bytes, MiB, ModelId
from prism.weights.client import PackedWeights

log = logging.getLogger(__name__)

REGISTER_BYTES = Bytes(16 * MiB)
"""Registered at once, in a millisecond: meanwhile nobody else gets into the driver or changes the address
space. Of pages that have not been touched it takes 3 ms, of new ones 6 to 8."""
PAUSE = 1.0
"""Seconds of rest for each second of work: without any, launches of the loop waited for 50 ms on an H200."""


class Pinner(Protocol):
    """Registers host memory with a device; both raise `DriverError`."""

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        """Pin a range for copies at full speed."""
        ...

    def unregister_host(self, address: Address) -> None:
        """Undo it for the range that begins at `address`."""
        ...


class Borrow(Protocol):
    """Borrows a model's packed weights, as a cached loan; raises `HostMemoryError`."""

    def __call__(self, model: ModelId, *, writable: bool) -> PackedWeights:
        """`writable`: mapped for writing too."""
        ...


class Registered(NamedTuple):
    """The beginning of a model's packed weights, registered in chunks of `REGISTER_BYTES`."""

    address: Address
    size: Bytes
    packed: PackedWeights | None
    """The loan itself, if all of them are registered: nobody needs another one."""


NOTHING = Registered(Address(0), Bytes(0), None)


@dataclass(slots=True, eq=False)
class _Entry:
    """A borrowed model."""

    model: ModelId
    loan: PackedWeights
    total: Bytes
    registered: Bytes
    num_users: int = 0
    is_recalled: bool = False
    has_failed: bool = False

    @property
    def is_whole(self) -> bool:
        """All of it is registered."""
        return self.registered == self.total


@dataclass(frozen=True, slots=True)
class _BorrowIt:
    model: ModelId


@dataclass(frozen=True, slots=True)
class _Grow:
    entry: _Entry


@dataclass(frozen=True, slots=True)
class _Shrink:
    """`registered` is lowered already, so that no load counts on the chunk at `begin` any more."""

    entry: _Entry
    begin: Bytes


@dataclass(frozen=True, slots=True)
class _Return:
    entry: _Entry


def choose(order: Sequence[ModelId], sizes: Mapping[ModelId, Bytes], budget: Bytes) -> list[ModelId]:
    """Models that should be registered: in order, each that fits what those before it leave. Pure."""
    chosen = []
    for model in order:
        size = sizes.get(model, 0)
        if 0 < size <= budget:
            chosen.append(model)
            budget = Bytes(budget - size)
    return chosen


class Registrations:
    """What one process has registered. `step` and `close` belong to one thread, the rest to any."""

    def __init__(self, pinner: Pinner, borrow: Borrow, budget: Bytes, likely: Sequence[ModelId]) -> None:
        """`likely` are all models that may be loaded here, the likeliest first."""
        self._pinner = pinner
        self._borrow = borrow
        self._budget = budget
        self._order = list(likely)
        self._sizes: dict[ModelId, Bytes] = {}  # of models that the store is known to hold
        self._entries: dict[ModelId, _Entry] = {}
        self._lost = Bytes(0)  # registered for ever: the driver would not undo it
        self._lost_loans: list[PackedWeights] = []  # of that: a loan is unmapped when nobody refers to it
        self._maps_writable = False
        self._lock = threading.Lock()  # never held over a call that takes time
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.error: str | None = None
        """Why something could not be registered, the first time."""

    # --- for the loop and for loads -----------------------------------------------------------------

    def announce(self, model: ModelId, size: Bytes) -> None:
        """The store holds so many bytes of a model's weights."""
        with self._lock:
            self._sizes[model] = size
        self._wake()

    def prefer(self, likely: Sequence[ModelId]) -> None:
        """From now on these are the likeliest, the first one most of all."""
        with self._lock:
            self._order = list(likely)
        self._wake()

    def registered_bytes(self, model: ModelId) -> Bytes:
        """How much of a model's weights is registered."""
        with self._lock:
            entry = self._entries.get(model)
            return Bytes(0) if entry is None else entry.registered

    def has_all(self, model: ModelId) -> bool:
        """Whether all of a model's weights are registered."""
        with self._lock:
            entry = self._entries.get(model)
            return entry is not None and entry.is_whole

    @property
    def total_bytes(self) -> Bytes:
        """All that is registered."""
        with self._lock:
            return self._total()

    @contextmanager
    def use(self, model: ModelId) -> Iterator[Registered]:
        """What of a model is registered, which it stays inside of this context."""
        with self._lock:
            entry = self._entries.get(model)
            if entry is not None and entry.registered:
                entry.num_users += 1
                packed = entry.loan if entry.is_whole else None
                registered = Registered(entry.loan.address, entry.registered, packed)
            else:
                entry, registered = None, NOTHING
        try:
            yield registered
        finally:
            if entry is not None:
                with self._lock:
                    entry.num_users -= 1
                self._wake()

    # --- one thread's ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Borrow, register, unregister or return one piece; whether there was anything to do."""
        for entry in self._entries.values():
            if not entry.is_recalled and entry.loan.is_recalled():
                entry.is_recalled = True
                with self._lock:
                    self._sizes.pop(entry.model, None)
        with self._lock:
            action = self._next_action()
        match action:
            case _BorrowIt(model=model):
                self._take(model)
            case _Grow(entry=entry):
                self._register(entry)
            case _Shrink(entry=entry, begin=begin):
                self._unregister(entry, begin)
            case _Return(entry=entry):
                with self._lock:
                    del self._entries[entry.model]
                entry.loan.close()
            case None:
                return False
        return True

    def wait(self) -> None:
        """Until something has changed: the order, what is held, what is used, or the store recalls a loan."""
        poller = select.poll()
        poller.register(self.wake, select.POLLIN)
        for entry in self._entries.values():
            if not entry.is_recalled and (fd := entry.loan.lease_fd) is not None:
                poller.register(fd, select.POLLIN)
        poller.poll()
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Unregister, then unmap everything but what a load uses, which ends with the process."""
        self.prefer(())
        while self.step():
            pass

    def _wake(self) -> None:
        os.eventfd_write(self.wake, 1)

    def _total(self) -> Bytes:
        return Bytes(self._lost + sum(entry.registered for entry in self._entries.values()))

    def _next_action(self) -> _BorrowIt | _Grow | _Shrink | _Return | None:
        """Room is made before it is taken, and what the store recalls comes before all else."""
        chosen = choose(self._order, self._sizes, Bytes(self._budget - self._lost))
        for entry in sorted(self._entries.values(), key=lambda e: not e.is_recalled):
            is_unused = entry.model not in chosen or (entry.has_failed and not entry.registered)
            if (is_unused or entry.is_recalled) and not entry.num_users:
                return self._shrink(entry)
        for model in chosen:
            entry_or_none = self._entries.get(model)
            if entry_or_none is None:
                return _BorrowIt(model)
            if entry_or_none.registered < entry_or_none.total and not entry_or_none.has_failed:
                size = self._chunk(entry_or_none)
                return _Grow(entry_or_none) if self._total() + size <= self._budget else None
        return None

    def _shrink(self, entry: _Entry) -> _Shrink | _Return:
        if not entry.registered:
            return _Return(entry)
        begin = Bytes((entry.registered - 1) // REGISTER_BYTES * REGISTER_BYTES)
        entry.registered = begin
        return _Shrink(entry, begin)

    @staticmethod
    def _chunk(entry: _Entry) -> Bytes:
        return Bytes(min(REGISTER_BYTES, entry.total - entry.registered))

    def _take(self, model: ModelId) -> None:
        try:
            loan = self._borrow(model, writable=self._maps_writable)
        except HostMemoryError:  # it was evicted meanwhile; the store says so when it holds it again
            with self._lock:
                self._sizes.pop(model, None)
            return
        with self._lock:
            self._entries[model] = _Entry(model, loan, self._sizes[model], Bytes(0))

    def _register(self, entry: _Entry) -> None:
        size = self._chunk(entry)
        address = Address(entry.loan.address + entry.registered)
        memfd.touch(address, size, writable=False)
        try:
            self._pinner.register_host(address, size, read_only=not self._maps_writable)
        except DriverError as error:
            if self._maps_writable or self._total():
                self._has_failed(entry, error)
                return
            self._maps_writable = True  # not every system can register what is mapped for reading only
            with self._lock:
                del self._entries[entry.model]
            entry.loan.close()
            return
        with self._lock:
            entry.registered = Bytes(entry.registered + size)

    def _unregister(self, entry: _Entry, begin: Bytes) -> None:
        try:
            self._pinner.unregister_host(Address(entry.loan.address + begin))
        except DriverError as error:
            # What is still registered must stay mapped: it is lost until this process ends.
            self._lost_loans.append(entry.loan)
            with self._lock:
                del self._entries[entry.model]
                self._sizes.pop(entry.model, None)
                self._lost = Bytes(self._lost + min(begin + REGISTER_BYTES, entry.total))
            self._has_failed(entry, error)

    def _has_failed(self, entry: _Entry, error: DriverError) -> None:
        entry.has_failed = True
        with self._lock:
            if not entry.registered:
                self._sizes.pop(entry.model, None)  # until it is announced again
        if self.error is None:
            self.error = f"{entry.model}: {error}"
            log.warning("packed weights are not registered, so loads are slower: %s", self.error)


class RegistrationThread:
    """Steps while there is anything to do, and sleeps otherwise."""

    def __init__(self, registrations: Registrations) -> None:
        self._registrations = registrations
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="registrations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, then give everything back."""
        self._is_closing = True
        os.eventfd_write(self._registrations.wake, 1)
        self._thread.join()
        self._registrations.close()

    def _run(self) -> None:
        while not self._is_closing:
            begin = time.monotonic()
            if self._registrations.step():
                time.sleep(PAUSE * (time.monotonic() - begin))
            else:
                self._registrations.wait()
