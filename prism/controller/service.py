"""The controller's connections: reports come in, routes and commands go out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import count

import msgspec
import zmq.asyncio

from prism import transport
from prism.controller.state import ControllerState
from prism.errors import Conflict, EngineFailure, InvalidRequest, Unavailable
from prism.messages import (
    Activate,
    CommandDone,
    Demand,
    Evict,
    Hello,
    ProcessEnded,
    ProcessUp,
    Report,
    Role,
    Routes,
    SetLimits,
    Stop,
)
from prism.types import ModelId, WorkerId

log = logging.getLogger(__name__)

COMMAND_SECONDS = 120.0


class WorkerLink:
    """A connection to one incarnation of a worker."""

    def __init__(self, socket: zmq.asyncio.Socket, reader: asyncio.Task[None]) -> None:
        self.socket = socket
        self.reader = reader

    def close(self) -> None:
        """Stop listening."""
        self.reader.cancel()
        self.socket.close(linger=0)


class ControllerService:
    """Owns the state; every event is one method."""

    def __init__(
        self,
        state: ControllerState,
        context: zmq.asyncio.Context,
        router: zmq.asyncio.Socket,
        agent: zmq.asyncio.Socket,
        identity: str,
    ) -> None:
        self.state = state
        self._context = context
        self._router = router
        self._agent = agent
        self._identity = identity
        self._links: dict[WorkerId, WorkerLink] = {}
        self._gateways: set[str] = set()
        self._commands: dict[int, asyncio.Future[CommandDone]] = {}
        self._command_workers: dict[int, WorkerId] = {}
        self._next_command = count(1)

    # --- sockets --------------------------------------------------------------------------------------

    async def follow_agent(self, stop: Callable[[], None]) -> None:
        """Who comes and goes."""
        async for _, message in transport.areceive(self._agent):
            match message:
                case ProcessUp(role=Role.WORKER, name=name, address=str(address)):
                    self._connect(WorkerId(name), address)
                case ProcessEnded(role=Role.WORKER, name=name):
                    self._worker_ended(WorkerId(name))
                case ProcessEnded(role=Role.GATEWAY, name=name, incarnation=incarnation):
                    self._gateways.discard(transport.identity_of(name, incarnation))
                case Stop():
                    stop()
                case _:
                    pass

    async def follow_gateways(self) -> None:
        """Whoever says Hello gets the routes. A demand for an unknown model is answered with them too."""
        async for sender, message in transport.areceive(self._router):
            match message:
                case Hello(role=Role.GATEWAY):
                    self._gateways.add(sender)
                    self._send_routes(sender)
                case Demand():
                    self._send_routes(sender)
                case _:
                    log.error("unexpected message dropped", extra={"sender": sender})

    def _send_routes(self, gateway: str) -> None:
        routes = Routes(epoch=self.state.epoch, version=self.state.version, routes=self.state.routes())
        transport.asend(self._router, routes, gateway)

    def _connect(self, worker: WorkerId, address: str) -> None:
        self._disconnect(worker)
        socket = transport.connect_dealer(self._context, address, self._identity)
        name, _, incarnation = self._identity.rpartition(".")
        transport.asend(socket, Hello(role=Role.CONTROLLER, name=name, incarnation=int(incarnation)))
        self._links[worker] = WorkerLink(socket, asyncio.create_task(self._follow_worker(socket)))

    def _disconnect(self, worker: WorkerId) -> None:
        link = self._links.pop(worker, None)
        if link is not None:
            link.close()

    async def _follow_worker(self, socket: zmq.asyncio.Socket) -> None:
        async for _, message in transport.areceive(socket):
            match message:
                case Report():
                    self.state.on_report(message)
                case CommandDone(command_id=number):
                    future = self._commands.get(number)
                    if future is not None and not future.done():
                        future.set_result(message)
                case _:
                    log.error("unexpected message dropped")

    def _worker_ended(self, worker: WorkerId) -> None:
        """What was asked of it fails now, not after a time-out."""
        self._disconnect(worker)
        self.state.on_worker_ended(worker)
        for number, future in self._commands.items():
            if self._command_workers[number] == worker and not future.done():
                future.set_exception(Unavailable(f"{worker} ended before it had done it", retry_after=1.0))

    # --- commands -------------------------------------------------------------------------------------

    async def load(self, model: ModelId, pinned: bool | None = None) -> None:
        """Have a model loaded; returns when it is active. Raises `Unavailable` or `EngineFailure`."""
        await self._command(model, Activate(epoch=0, command_id=0, model=model, pinned=pinned))

    async def unload(self, model: ModelId) -> None:
        """Have a model evicted. Raises `Unavailable`, or `Conflict` while it is in use."""
        try:
            await self._command(model, Evict(epoch=0, command_id=0, model=model))
        except EngineFailure as error:
            raise Conflict(error.message, param="model") from None

    async def set_limits(self, model: ModelId, floor: int, limit: int | None) -> None:
        """Change a model's KV floor and limit, in bytes. Raises `InvalidRequest` for what can never be."""
        report = self.state.reports.get(self.state.homes[model])
        if report is not None and floor > report.num_slabs * report.slab_bytes:
            raise InvalidRequest("is more than the memory of the model's device", param="kv_floor_bytes")
        command = SetLimits(epoch=0, command_id=0, model=model, kv_floor_bytes=floor, kv_limit_bytes=limit)
        await self._command(model, command)

    async def _command(self, model: ModelId, command: Activate | Evict | SetLimits) -> None:
        worker = self.state.homes[model]
        link = self._links.get(worker)
        if link is None:
            raise Unavailable(f"{worker}, where {model} lives, is not up", retry_after=1.0)
        number = next(self._next_command)
        future = asyncio.get_running_loop().create_future()
        self._commands[number] = future
        self._command_workers[number] = worker
        command = msgspec.structs.replace(command, epoch=self.state.epoch, command_id=number)
        transport.asend(link.socket, command)
        try:
            done = await asyncio.wait_for(future, COMMAND_SECONDS)
        except TimeoutError:
            raise Unavailable(f"{worker} has not done it within {COMMAND_SECONDS:g} s") from None
        finally:
            del self._commands[number], self._command_workers[number]
        if done.error is not None:
            raise EngineFailure(done.error)
