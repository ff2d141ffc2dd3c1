"""Jobs that run beside the loop: loading a model's weights and taking them off the device again.

A job runs on a thread and touches nothing of the loop's; most of its time is spent in calls that release
the interpreter lock. It ends by posting one event.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prism.errors import CheckpointError, PrismError
from prism.memory.arena import Arena
from prism.memory.driver import Handle
from prism.types import ModelId
from prism.weights.client import PackedWeights
from prism.weights.loader import LoadJob, LoadOutcome


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


class Load:
    """One model's weights on their way to the device."""

    def __init__(
        self,
        model: ModelId,
        fetch: Fetch,
        arena: Arena,
        handles: tuple[Handle, ...],
        fingerprint: str,
        target: Tensor,
        prepare: Callable[[], None],
        finish: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._fetch = fetch
        self._arena = arena
        self._handles = handles
        self._fingerprint = fingerprint
        self._target = target  # [weights bytes] uint8 over the arena
        self._prepare = prepare  # before the first byte is copied
        self._finish = finish  # after the last one
        self._clock = clock
        self._job: LoadJob | None = None
        self._is_cancelled = False

    @property
    def progress(self) -> float:
        """Share of the bytes that have arrived."""
        return 0.0 if self._job is None else self._job.progress / self._job.total_bytes

    def cancel(self) -> None:
        """Stop at the next chunk."""
        self._is_cancelled = True
        if self._job is not None:
            self._job.cancel()

    def run(self) -> Loaded:
        """Map the arena, copy, verify. Whatever goes wrong is in the event, and the arena unmapped."""
        begin = self._clock()
        try:
            self._load()
        except Exception as error:  # the loop must learn of any failure, or the model loads for ever
            failure = self._undo() or error
            return Loaded(self._model, self._clock() - begin, failure)
        return Loaded(self._model, self._clock() - begin, None)

    def _load(self) -> None:
        with self._fetch(self._model) as packed:
            if packed.fingerprint != self._fingerprint:
                raise CheckpointError("changed since the server started", file=str(self._model))
            self._prepare()
            self._arena.map(self._handles)
            job = self._job = LoadJob(packed, self._target)
            if self._is_cancelled:
                job.cancel()
            if job.run() is LoadOutcome.CANCELLED:
                raise LoadCancelled
            self._finish()

    def _undo(self) -> Exception | None:
        try:
            if not self._arena.is_empty:
                self._arena.unmap()
        except Exception as error:
            return error
        return None


def unload(model: ModelId, arena: Arena, delay: float) -> Unloaded:
    """Unmap an arena that no queued step reads, after `delay` seconds."""
    try:
        if delay:
            time.sleep(delay)
        arena.unmap()
    except Exception as error:
        return Unloaded(model, error)
    return Unloaded(model, None)
