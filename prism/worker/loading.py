"""Jobs that run beside the loop: loading a model's weights and taking them off the device again.

A job runs on a thread and touches nothing of the loop's; most of its time is spent in calls that release
the interpreter lock. It ends by posting one event.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from prism.errors import CheckpointError, PrismError
from prism.memory.arena import Arena
from prism.memory.driver import Handle
from prism.types import ModelId
from prism.weights.client import PackedWeights
from prism.weights.layout import Layout
from prism.weights.link import Link
from prism.weights.places import Places
from prism.weights.registrations import NOTHING, Registered, Registrations
from prism.weights.transfers import NEVER, Transfer


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load has ended; `error` says how, if not well."""

    model: ModelId
    seconds: float
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Unloaded:
    """An arena has been unmapped; with an `error` it is still mapped."""

    model: ModelId
    error: Exception | None


JobEvent = Loaded | Unloaded


Fetch = Callable[[ModelId], PackedWeights]
"""Borrows a model's packed weights from the host store. Raises `HostMemoryError`."""


class Jobs(Protocol):
    """Runs functions beside the loop and hands their results back to it as events."""

    def start(self, work: Callable[[], JobEvent]) -> None:
        """Run `work`; its event reaches the loop."""
        ...


class LoadCancelled(PrismError):
    """The load was told to stop."""

    def __str__(self) -> str:
        return "the load was cancelled"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load does, apart from its copy."""

    model: ModelId
    layout: Layout
    arena: Arena
    handles: tuple[Handle, ...]
    """Of the slabs, in the arena's order."""
    places: Places
    """The same slabs in the pool's window, where they can be written before the arena is mapped."""
    prepare: Callable[[], None]
    """Has the model's kernels built and loaded."""
    fill: Callable[[], None]
    """Writes what lies behind the weights in the arena, once it is mapped."""


class Load:
    """One model's weights on their way to the device.

    The link's thread copies into the slabs' places in the window, while `run`, on a thread of its own, maps
    the arena over the same slabs.
    """

    def __init__(
        self,
        plan: LoadPlan,
        fetch: Fetch,
        registrations: Registrations | None,
        link: Link,
        clock: Callable[[], float],
    ) -> None:
        self._plan = plan
        self._fetch = fetch
        self._registrations = registrations
        self._link = link
        self._clock = clock
        self._deadline = NEVER
        self._transfer: Transfer | None = None
        self._is_mapped = False
        self.digest = b""
        """Of the weights, by their checksums; known before anything arrives."""
        self.is_cancelled = False
        """It will end soon, and never well."""

    # --- for the loop -------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the bytes that have arrived."""
        return 0.0 if self._transfer is None else self._transfer.arrived / self._transfer.total

    @property
    def groups_arrived(self) -> int:
        """How many of the layout's groups (embedding, each layer, head) can be read in the arena.

        It only grows. Whatever is queued on any stream after this was read finds there the bytes of these
        groups, the table of positions, and the model's kernels. Whether the bytes are the right ones is known
        when the load has ended well: until then nothing computed from them may leave the worker. After a load
        that ends otherwise the arena is unmapped once the lane's queued steps have completed.
        """
        if not self._is_mapped or self._transfer is None:
            return 0
        return bisect_right(self._plan.layout.group_ends, self._transfer.arrived)

    @property
    def deadline(self) -> float:
        """When the first token that waits for it is due; loads share the link by it."""
        return self._deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self._deadline = deadline
        if self._transfer is not None:
            self._transfer.deadline = deadline

    def cancel(self) -> None:
        """Stop at the next piece."""
        self.is_cancelled = True
        if self._transfer is not None:
            self._transfer.cancel()

    # --- its thread ---------------------------------------------------------------------------------

    def run(self) -> Loaded:
        """Copy, map, verify. Nothing writes to the slabs afterwards, but the arena may be mapped."""
        begin = self._clock()
        try:
            self._load()
        except Exception as error:  # the loop must learn of any failure, or the model loads for ever
            failure = error.with_traceback(None)  # its frames hold the transfer, which holds the error
            return Loaded(self._plan.model, self._clock() - begin, failure)
        return Loaded(self._plan.model, self._clock() - begin, None)

    def _load(self) -> None:
        model = self._plan.model
        with self._registered() as registered, self._borrowed(registered) as packed:
            if packed.fingerprint != self._plan.layout.fingerprint:
                raise CheckpointError("changed since the server started", file=str(model))
            self.digest = blake2b(packed.checksums.tobytes(), digest_size=16).digest()
            transfer = self._transfer = Transfer(packed, self._plan.places, registered)
            transfer.deadline = self._deadline  # what is set from here on reaches the transfer itself
            if self.is_cancelled:
                raise LoadCancelled
            self._link.start(transfer)
            try:
                self._map()
            except BaseException:
                transfer.cancel()
                raise
            finally:
                self._link.wait(transfer)
            if transfer.error is not None:
                raise transfer.error
            if not transfer.has_arrived:
                raise LoadCancelled

    def _borrowed(self, registered: Registered) -> AbstractContextManager[PackedWeights]:
        """What is registered as a whole is borrowed already, which saves asking the store: 2 to 7 ms."""
        return self._fetch(self._plan.model) if registered.packed is None else nullcontext(registered.packed)

    def _map(self) -> None:
        self._plan.prepare()
        if self.is_cancelled:
            return
        self._plan.arena.map(self._plan.handles)
        self._plan.fill()
        self._is_mapped = True

    def _registered(self) -> AbstractContextManager[Registered]:
        if self._registrations is None:
            return nullcontext(NOTHING)
        return self._registrations.use(self._plan.model)


def unload(model: ModelId, arena: Arena, delay: float) -> Unloaded:
    """Unmap an arena that no queued step reads, after `delay` seconds. Its slabs may be others' by now."""
    try:
        if delay:
            time.sleep(delay)
        arena.unmap()
    except Exception as error:
        return Unloaded(model, error)
    return Unloaded(model, None)
