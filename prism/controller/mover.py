"""Has workers carry out what migrations need (moves.py), and tells what has come of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from prism.controller import migration as steps
from prism.controller.migration import Migration
from prism.controller.moves import Moves
from prism.controller.state import ControllerState
from prism.errors import Conflict, EngineFailure, RequestError
from prism.messages import Activate, Evict, SetLimits
from prism.metrics import Metrics
from prism.types import ModelId, WorkerId

log = logging.getLogger(__name__)


class Commander(Protocol):
    """Has workers do something."""

    async def command(self, worker: WorkerId, command: Activate | Evict | SetLimits) -> list[str]:
        """Returns when it is done, with the models that have no room any more; raises a `RequestError`."""
        ...


class Mover:
    """The hands of `Moves` in the server; see `Hands` for what is not told here."""

    def __init__(
        self,
        state: ControllerState,
        commander: Commander,
        routes_changed: Callable[[], None],
        now: Callable[[], float],
        metrics: Metrics,
        *,
        cooldown: float,
        drain_seconds: float,
    ) -> None:
        self.moves = Moves(state, self, cooldown=cooldown, drain_seconds=drain_seconds)
        self._state = state
        self._commander = commander
        self._routes_changed = routes_changed
        self._now = now
        self._metrics = metrics
        self._switched: dict[ModelId, asyncio.Future[str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def until_switched(self, model: ModelId) -> str | None:
        """Wait until new requests go to the target of the migration under way, or why they never will."""
        if model not in self._state.migrations:
            return None
        future = self._switched.setdefault(model, asyncio.get_running_loop().create_future())
        return await asyncio.shield(future)

    def activate(self, model: ModelId, worker: WorkerId, number: int) -> None:
        """See `Hands`."""
        self._spawn(self._activate(model, worker, number))

    def evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None:
        """See `Hands`."""
        self._spawn(self._evict(model, worker, returns, number))

    def switched(self, model: ModelId) -> None:
        """See `Hands`."""
        self._resolve(model, None)

    def over(self, migration: Migration, failure: str | None) -> None:
        """See `Hands`."""
        model = migration.model
        result = "done" if failure is None else "failed"
        self._metrics.migrations.labels(model, result).inc()
        self._resolve(model, failure)
        if failure is None:
            log.info("model %s has moved", model)
        else:
            log.warning("model %s has not moved: %s", model, failure)

    def routes_changed(self) -> None:
        """See `Hands`."""
        self._routes_changed()

    def _resolve(self, model: ModelId, failure: str | None) -> None:
        future = self._switched.pop(model, None)
        if future is not None and not future.done():
            future.set_result(failure)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _activate(self, model: ModelId, worker: WorkerId, number: int) -> None:
        """With what an administrator has changed meanwhile: limits, and whether it is pinned."""
        reports = (self._state.report_of(home, model) for home in self._state.workers(model))
        source = next((report for report in reports if report is not None), None)
        event: steps.Event = steps.TargetActive()
        try:
            if source is not None:
                floor, limit = source.kv_floor_bytes, source.kv_limit_bytes
                limits = SetLimits(
                    epoch=0, command_id=0, model=model, kv_floor_bytes=floor, kv_limit_bytes=limit
                )
                await self._commander.command(worker, limits)
            pinned = None if source is None else source.pinned
            await self._commander.command(worker, Activate(epoch=0, command_id=0, model=model, pinned=pinned))
        except RequestError as error:
            event = steps.TargetFailed(error.message)
        self.moves.on_event(model, event, self._now(), number)

    async def _evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None:
        event: steps.Event = steps.SourceCold()
        try:
            await self._commander.command(
                worker, Evict(epoch=0, command_id=0, model=model, returns=returns, moved=True)
            )
        except (Conflict, EngineFailure):
            event = steps.EvictRefused()
        except RequestError:
            return  # the worker has ended, or does not answer: other events tell
        self.moves.on_event(model, event, self._now(), number)
