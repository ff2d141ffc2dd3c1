"""The controller's events: reports and demands come in, routes and commands go out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping

import zmq.asyncio

from prism import transport
from prism.clock import Clock
from prism.controller.decisions import Plan
from prism.controller.links import WorkerLinks
from prism.controller.migration import CALLED_OFF
from prism.controller.planner import Planner
from prism.controller.silence import SILENT_SECONDS, Silence
from prism.controller.state import ControllerState
from prism.errors import Conflict, EngineFailure, InvalidRequest, RequestError, Unavailable
from prism.messages import (
    Activate,
    Demand,
    Evict,
    Hello,
    Hung,
    ProcessEnded,
    ProcessUp,
    Report,
    Role,
    Routes,
    SetLimits,
    Stop,
)
from prism.types import ModelId, Seconds, WorkerId

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
REBUILD_SECONDS = 2.0
"""A later controller sends no routes until all workers have reported, or for so long."""


class ControllerService:
    """Owns the state; every event is one method."""

    def __init__(
        self,
        state: ControllerState,
        planner: Callable[[ControllerState, WorkerLinks, Callable[[], None]], Planner],
        context: zmq.asyncio.Context,
        router: zmq.asyncio.Socket,
        agent: zmq.asyncio.Socket,
        identity: str,
        clock: Clock,
        watchdogs: Mapping[WorkerId, Seconds],
    ) -> None:
        """`planner` makes the one that has this service's connections; see `Silence` for `watchdogs`."""
        self.state = state
        self.links = WorkerLinks(context, identity, state.epoch, self._on_report)
        self.planner = planner(state, self.links, self._routes_changed)
        self.silence = Silence(watchdogs)
        self._incarnations: dict[WorkerId, int] = {}
        self._router = router
        self._agent = agent
        self._clock = clock
        self._gateways: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = clock.now()
        self._is_rebuilt = state.epoch <= 1

    # --- sockets --------------------------------------------------------------------------------------

    async def follow_agent(self, stop: Callable[[], None]) -> None:
        """Who comes and goes."""
        async for _, message in transport.areceive(self._agent):
            match message:
                case ProcessUp(role=Role.WORKER, name=name, incarnation=incarnation, address=str(address)):
                    self._incarnations[WorkerId(name)] = incarnation
                    self.silence.heard(WorkerId(name), self._clock.now())
                    self.links.connect(WorkerId(name), address)
                case ProcessEnded(role=Role.WORKER, name=name):
                    self._worker_ended(WorkerId(name))
                case ProcessEnded(role=Role.GATEWAY, name=name, incarnation=incarnation):
                    self._gateways.discard(transport.identity_of(name, incarnation))
                case Stop():
                    stop()
                case _:
                    pass

    async def follow_gateways(self) -> None:
        """Whoever says Hello gets the routes. A demand is answered with them too."""
        async for sender, message in transport.areceive(self._router):
            match message:
                case Hello(role=Role.GATEWAY):
                    self._gateways.add(sender)
                    self._send_routes(sender)
                case Demand(model=model):
                    self.planner.on_demand(ModelId(model))
                    self._send_routes(sender)
                case _:
                    log.error("unexpected message dropped", extra={"sender": sender})

    async def follow_time(self) -> None:
        """What has taken too long, and now and then a look at everything."""
        while True:
            await self._clock.wait(asyncio.Event(), self._clock.now() + TICK_SECONDS)
            if not self._is_rebuilt and self._clock.now() >= self._began + REBUILD_SECONDS:
                self._rebuilt()
            self._look_for_silent()
            self.planner.tick()

    def _look_for_silent(self) -> None:
        now = self._clock.now()
        silent = self.silence.look(now)
        for worker in sorted(silent):
            log.warning("%s has not reported for %g s, though its process lives", worker, SILENT_SECONDS)
        if silent:
            self._routes_changed()
        for worker, seconds in self.silence.hung(now).items():
            hung = Hung(name=worker, incarnation=self._incarnations[worker], silent_seconds=seconds)
            transport.asend(self._agent, hung)

    def _send_routes(self, gateway: str) -> None:
        if self._is_rebuilt:
            state = self.state
            routes = Routes(
                epoch=state.epoch,
                version=state.version,
                routes=state.routes(),
                silent=sorted(self.silence.workers),
            )
            transport.asend(self._router, routes, gateway)

    def _routes_changed(self) -> None:
        self.state.version += 1
        for gateway in self._gateways:
            self._send_routes(gateway)
        for worker in self.links.up:
            self._tell_homes(worker)

    def _tell_homes(self, worker: WorkerId) -> None:
        if self._is_rebuilt:
            self.links.tell_homes(worker, self.state.living_at(worker))

    def _rebuilt(self) -> None:
        self._is_rebuilt = True
        self._routes_changed()

    def _on_report(self, report: Report) -> None:
        worker = WorkerId(report.worker)
        known = self.state.reports.get(worker)
        if not self.state.on_report(report):
            return
        if self.silence.heard(worker, self._clock.now()):
            log.warning("%s reports again", worker)
            self._routes_changed()
        self.planner.on_report(report)
        if known is None:
            self._tell_homes(worker)
            for model in self.state.sent_away(worker):
                self._spawn(self._send_away(worker, model))
            for model in self.planner.to_preload(worker):
                self._spawn(self._preload(worker, model))
        if not self._is_rebuilt and self.state.reports.keys() >= self.planner.workers:
            self._rebuilt()

    def _worker_ended(self, worker: WorkerId) -> None:
        self.links.ended(worker)
        self.state.on_worker_ended(worker)
        self.planner.on_worker_ended(worker)
        if self.silence.ended(worker):
            self._routes_changed()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_away(self, worker: WorkerId, model: ModelId) -> None:
        """Once more: it was unloaded, and the worker has been started anew."""
        try:
            await self.links.command(worker, Evict(epoch=0, command_id=0, model=model))
        except RequestError as error:
            log.info("model %s, which was unloaded, is there again: %s", model, error.message)

    async def _preload(self, worker: WorkerId, model: ModelId) -> None:
        try:
            await self.links.command(worker, Activate(epoch=0, command_id=0, model=model))
        except RequestError as error:
            log.error("model %s could not be loaded at start: %s", model, error.message)

    @property
    def plan(self) -> Plan | None:
        """How the last look found everything; None before the first."""
        return self.planner.plan

    # --- for an administrator -------------------------------------------------------------------------

    async def load(self, model: ModelId, pinned: bool | None = None) -> list[str]:
        """Have a model loaded at all its homes; returns when it is active, with those it leaves no room.

        Raises `Unavailable`, `EngineFailure`, or `Conflict` if it is unloaded meanwhile.
        """
        activate = Activate(epoch=0, command_id=0, model=model, pinned=pinned)
        return await self._command(self.state.workers(model), activate)

    async def _command(self, workers: Iterable[WorkerId], command: Activate | Evict | SetLimits) -> list[str]:
        """Have one worker after the other do it; the models that have no room any more.

        These are named in the log, too: it was not about them that somebody asked.
        """
        crowded_out: dict[str, None] = {}
        for worker in workers:
            crowded_out |= dict.fromkeys(await self.links.command(worker, command))
        if crowded_out:
            log.warning("model %s is pinned and leaves no room for %s", command.model, ", ".join(crowded_out))
            self.planner.look_soon()
        return list(crowded_out)

    async def unload(self, model: ModelId) -> None:
        """Have a model evicted wherever it is.

        Raises `Unavailable`, `EngineFailure`, or `Conflict` while it is in use.
        """
        self.planner.call_off(model)
        await self._command(self.state.places(model), Evict(epoch=0, command_id=0, model=model))

    async def set_limits(self, model: ModelId, floor: int, limit: int | None) -> list[str]:
        """Change a model's KV floor and limit, in bytes; the models that it leaves no room.

        Raises `InvalidRequest` for what can never be.
        """
        for worker in self.state.places(model):
            report = self.state.reports.get(worker)
            if report is not None and floor > report.num_slabs * report.slab_bytes:
                raise InvalidRequest("is more than the memory of the model's device", param="kv_floor_bytes")
        command = SetLimits(epoch=0, command_id=0, model=model, kv_floor_bytes=floor, kv_limit_bytes=limit)
        return await self._command(self.state.places(model), command)

    async def move(self, model: ModelId, device: int) -> WorkerId:
        """Move a model's first home; returns when new requests go there.

        Raises `InvalidRequest`, `Conflict`, `Unavailable` or `EngineFailure`.
        """
        target = WorkerId(f"worker-{device}")
        self.planner.check_move(model, target)
        if target not in self.links.up:
            raise Unavailable(f"{target} is not up", retry_after=1.0)
        failure = await self.planner.move(model, target)
        if failure == CALLED_OFF:
            raise Conflict(f"the move was {CALLED_OFF} by another command", param="model")
        if failure is not None:
            raise EngineFailure(failure)
        return target
