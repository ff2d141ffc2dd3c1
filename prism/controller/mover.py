"""Carries migrations out: their effects become commands and routes, what comes of it becomes events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, assert_never

from prism.controller import migration as steps
from prism.controller.migration import Migration, Phase
from prism.controller.state import ControllerState
from prism.errors import EngineFailure, RequestError
from prism.messages import Activate, Evict, SetLimits
from prism.metrics import Metrics
from prism.types import ModelId, ModelState, WorkerId

log = logging.getLogger(__name__)


class Commander(Protocol):
    """Has workers do something."""

    async def command(self, worker: WorkerId, command: Activate | Evict | SetLimits) -> None:
        """Returns when it is done; raises a `RequestError`."""
        ...


class Mover:
    """All migrations under way. Each model has one at most."""

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
        self._state = state
        self._commander = commander
        self._routes_changed = routes_changed
        self._now = now
        self._metrics = metrics
        self._cooldown = cooldown
        self._drain_seconds = drain_seconds
        self._numbers: dict[ModelId, int] = {}
        """How many migrations a model has begun: what is heard of an earlier one is void."""
        self._switched: dict[ModelId, asyncio.Future[str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, model: ModelId, source: WorkerId | None, target: WorkerId | None) -> None:
        """Begin a move, a replica or a merge of a model that is not being moved."""
        assert model not in self._state.migrations
        log.info("model %s moves from %s to %s", model, source, target)
        self._numbers[model] = self._numbers.get(model, 0) + 1
        self._take(model, steps.begin(model, source, target, self._now()))

    async def switched(self, model: ModelId) -> str | None:
        """Wait until new requests go to the target of the migration under way, or why they never will."""
        if model not in self._state.migrations:
            return None
        future = self._switched.setdefault(model, asyncio.get_running_loop().create_future())
        return await asyncio.shield(future)

    # --- events ---------------------------------------------------------------------------------------

    def on_report(self, worker: WorkerId) -> None:
        """A worker's news may be what a migration waits for."""
        for model, migration in tuple(self._state.migrations.items()):
            for event in self._heard(migration, worker):
                self._on_event(model, event)

    def _heard(self, migration: Migration, worker: WorkerId) -> list[steps.Event]:
        report = self._state.report_of(worker, migration.model)
        if report is None:
            return []
        if worker == migration.target:
            return [steps.TargetActive()] if report.state is ModelState.ACTIVE else []
        if worker == migration.source and report.state is ModelState.COLD:
            return [steps.SourceCold()]
        is_idle = worker == migration.source and report.num_running + report.num_waiting == 0
        return [steps.SourceIdle()] if is_idle else []

    def on_worker_ended(self, worker: WorkerId) -> None:
        """A worker has died, whatever its part."""
        for model in tuple(self._state.migrations):
            self._on_event(model, steps.WorkerEnded(worker))

    def tick(self) -> None:
        """Time has passed."""
        for model in tuple(self._state.migrations):
            self._on_event(model, steps.Tick())

    def call_off(self, model: ModelId) -> None:
        """An administrator wants something else."""
        self._on_event(model, steps.CalledOff())

    def _on_event(self, model: ModelId, event: steps.Event) -> None:
        migration = self._state.migrations.get(model)
        if migration is not None:
            step = steps.advance(migration, event, self._now(), self._drain_seconds)
            if step.after is not migration:
                self._take(model, step)

    # --- effects --------------------------------------------------------------------------------------

    def _take(self, model: ModelId, step: steps.Step) -> None:
        if step.after is None:
            self._state.migrations.pop(model, None)
        else:
            self._state.migrations[model] = step.after
        for effect in step.effects:
            self._perform(model, effect)
        if step.after is None or step.after.phase is not Phase.LOADING:
            self._routes_changed()

    def _perform(self, model: ModelId, effect: steps.Effect) -> None:
        match effect:
            case steps.ActivateAt(worker):
                self._spawn(self._activate(model, worker, self._numbers[model]))
            case steps.EvictAt(worker, returns):
                self._spawn(self._evict(model, worker, returns, self._numbers[model]))
            case steps.Switch(old, new):
                self._state.switch(model, old, new, self._now(), self._cooldown)
                self._resolve(model, None)
            case steps.Over(failure):
                self._over(model, failure)
            case _:
                assert_never(effect)

    def _over(self, model: ModelId, failure: str | None) -> None:
        result = "done" if failure is None else "failed"
        self._metrics.migrations.labels(model, result).inc()
        self._resolve(model, failure)
        if failure is None:
            log.info("model %s has moved", model)
            return
        log.warning("model %s has not moved: %s", model, failure)
        self._state.stay(model, self._now(), self._cooldown)

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
        if self._numbers[model] == number:
            self._on_event(model, event)

    async def _evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None:
        event: steps.Event = steps.SourceCold()
        try:
            await self._commander.command(
                worker, Evict(epoch=0, command_id=0, model=model, returns=returns, moved=True)
            )
        except EngineFailure:
            event = steps.EvictRefused()
        except RequestError:
            return  # the worker has ended, or does not answer: other events tell
        if self._numbers[model] == number:
            self._on_event(model, event)
