"""The gateway's connections: to the agent, which says who is alive, to the controller and to all workers.

Each incarnation of a worker has an address of its own, so a new one is a new connection: nothing that was
meant for the old one can reach it, and nothing that the old one said can be taken for the new one's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Protocol

import zmq.asyncio

from prism.gateway.requests import Placement
from prism.messages import (
    CancelChoice,
    Demand,
    Hello,
    Outputs,
    ProcessEnded,
    ProcessUp,
    Ready,
    Rejected,
    Report,
    Returned,
    Role,
    Routes,
    Started,
    Stop,
    Submit,
    WeightsFailed,
    WeightsHeld,
)
from prism.transport import areceive, asend, connect_dealer, identity_of, wait_disconnected
from prism.types import Incarnation, WorkerId

WorkerMessage = Outputs | Started | Rejected | Returned | Report
log = logging.getLogger(__name__)

MOST_READING = 0.005
"""Seconds for which a worker's messages are read before others have a turn, those who send to clients too."""
WAITED = 0.001
"""Seconds after a message behind which the next one is taken to have come later: others had their turn."""


class Listener(Protocol):
    """Who hears what the other processes say."""

    def on_worker_up(self, placement: Placement) -> None:
        """A worker listens."""
        ...

    def on_worker_ended(self, placement: Placement) -> None:
        """A worker has ended."""
        ...

    def on_worker_message(self, placement: Placement, message: WorkerMessage) -> None:
        """What a worker says."""
        ...

    def on_packing(self, news: WeightsFailed | WeightsHeld) -> None:
        """A model's weights cannot be packed, or can be again."""
        ...

    def on_controller_up(self) -> None:
        """A new controller."""
        ...

    def on_routes(self, routes: Routes) -> None:
        """A routing table."""
        ...


class _Link:
    """One connection and the task that reads it."""

    def __init__(self, socket: zmq.asyncio.Socket, reader: asyncio.Task[None]) -> None:
        self.socket = socket
        self._reader = reader

    def close(self) -> None:
        self._reader.cancel()
        self.socket.close(linger=0)


class ProcessLinks:
    """All connections of one gateway. `listener` must be set before `run`."""

    def __init__(self, name: str, incarnation: int, agent_address: str) -> None:
        self.listener: Listener | None = None
        self._name = name
        self._incarnation = incarnation
        self._hello = Hello(role=Role.GATEWAY, name=name, incarnation=incarnation)
        self._context = zmq.asyncio.Context()
        self._workers: dict[Placement, _Link] = {}
        self._controller: tuple[Placement, _Link] | None = None
        self._agent = self._connect(agent_address)

    def _connect(self, address: str) -> zmq.asyncio.Socket:
        return connect_dealer(self._context, address, identity_of(self._name, self._incarnation))

    # --- sending ----------------------------------------------------------------------------------------

    def to_worker(self, placement: Placement, message: Submit | CancelChoice) -> None:
        """To one incarnation of a worker."""
        if (link := self._workers.get(placement)) is not None:
            asend(link.socket, message)

    def to_controller(self, message: Demand) -> None:
        """To the controller, if there is one."""
        if self._controller is not None:
            asend(self._controller[1].socket, message)

    def ready(self) -> None:
        """Tell the agent that HTTP is served."""
        asend(self._agent, Ready(role=Role.GATEWAY, name=self._name, incarnation=self._incarnation))

    # --- receiving --------------------------------------------------------------------------------------

    async def run(self, on_stop: Callable[[float], None]) -> None:
        """Follow the agent; returns when it has gone."""
        gone = asyncio.create_task(wait_disconnected(self._agent))
        asend(self._agent, self._hello)
        reader = asyncio.create_task(self._read_agent(on_stop))
        try:
            await asyncio.wait((gone, reader), return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
            log.error("the agent has gone")
        finally:
            gone.cancel()
            reader.cancel()

    async def _read_agent(self, on_stop: Callable[[float], None]) -> None:
        async for envelope in areceive(self._agent):
            match envelope.message:
                case ProcessUp() as up:
                    self._on_up(up)
                case ProcessEnded() as ended:
                    self._on_ended(ended)
                case WeightsFailed() | WeightsHeld() as news:
                    self._heard.on_packing(news)
                case Stop(grace=grace):
                    on_stop(grace)
                case other:
                    log.error("unexpected message from the agent: %s", type(other).__name__)

    def _on_up(self, up: ProcessUp) -> None:
        if up.address is None or up.role is Role.GATEWAY:
            return
        placement = Placement(WorkerId(up.name), Incarnation(up.incarnation))
        if up.role is Role.CONTROLLER:
            self._close_controller()
            self._controller = placement, self._link(up.address, self._read_controller)
            self._heard.on_controller_up()
        elif placement not in self._workers:
            for earlier in [each for each in self._workers if each.worker == placement.worker]:
                self._workers.pop(earlier).close()
            self._workers[placement] = self._link(
                up.address, lambda socket: self._read_worker(placement, socket)
            )
            self._heard.on_worker_up(placement)

    def _on_ended(self, ended: ProcessEnded) -> None:
        placement = Placement(WorkerId(ended.name), Incarnation(ended.incarnation))
        if ended.role is Role.CONTROLLER and self._controller is not None:
            if self._controller[0] == placement:
                self._close_controller()
        elif ended.role is Role.WORKER and (link := self._workers.pop(placement, None)) is not None:
            link.close()
            self._heard.on_worker_ended(placement)

    def _close_controller(self) -> None:
        if self._controller is not None:
            self._controller[1].close()
            self._controller = None

    def _link(self, address: str, read: Callable[[zmq.asyncio.Socket], Awaitable[None]]) -> _Link:
        socket = self._connect(address)
        asend(socket, self._hello)
        return _Link(socket, asyncio.ensure_future(read(socket)))

    async def _read_controller(self, socket: zmq.asyncio.Socket) -> None:
        async for envelope in areceive(socket):
            if isinstance(envelope.message, Routes):
                self._heard.on_routes(envelope.message)

    async def _read_worker(self, placement: Placement, socket: zmq.asyncio.Socket) -> None:
        """Messages that are there are read without a rest: then what they bring goes out together."""
        begun = ended = monotonic()
        async for envelope in areceive(socket):
            if monotonic() - ended > WAITED:
                begun = monotonic()
            message = envelope.message
            if isinstance(message, WorkerMessage):
                self._heard.on_worker_message(placement, message)
            ended = monotonic()
            if ended - begun > MOST_READING:
                await asyncio.sleep(0)
                begun = ended = monotonic()

    @property
    def _heard(self) -> Listener:
        assert self.listener is not None
        return self.listener

    def close(self) -> None:
        """Close everything; what was sent last still goes out."""
        self._close_controller()
        for link in self._workers.values():
            link.close()
        self._workers.clear()
        self._agent.close()
        self._context.destroy()
