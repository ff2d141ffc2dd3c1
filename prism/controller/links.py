"""The controller's connections to workers, and the commands that are under way on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

import msgspec
import zmq.asyncio

from prism import transport
from prism.errors import Conflict, EngineFailure, Unavailable
from prism.messages import Abandon, Activate, CommandDone, Evict, Hello, Homes, Report, Role, SetLimits
from prism.transport import Envelope
from prism.types import ModelId, WorkerId

COMMAND_SECONDS = 120.0


class _Link:
    def __init__(self, socket: zmq.asyncio.Socket, reader: asyncio.Task[None]) -> None:
        self.socket = socket
        self.reader = reader

    def close(self) -> None:
        self.reader.cancel()
        self.socket.close(linger=0)


class WorkerLinks:
    """One connection to the present incarnation of each worker that is up."""

    def __init__(
        self, context: zmq.asyncio.Context, identity: str, epoch: int, on_report: Callable[[Report], None]
    ) -> None:
        self._context = context
        self._identity = identity
        self._epoch = epoch
        self._on_report = on_report
        self._links: dict[WorkerId, _Link] = {}
        self._commands: dict[int, tuple[WorkerId, asyncio.Future[CommandDone]]] = {}
        self._next_command = count(1)

    @property
    def up(self) -> frozenset[WorkerId]:
        """Workers that can be commanded."""
        return frozenset(self._links)

    def connect(self, worker: WorkerId, address: str) -> None:
        """A worker has come up."""
        self._disconnect(worker)
        socket = transport.connect_dealer(self._context, address, self._identity)
        name, _, incarnation = self._identity.rpartition(".")
        transport.asend(socket, Hello(role=Role.CONTROLLER, name=name, incarnation=int(incarnation)))
        self._links[worker] = _Link(socket, asyncio.create_task(self._follow(socket)))

    def ended(self, worker: WorkerId) -> None:
        """What was asked of it fails now, not after a time-out."""
        self._disconnect(worker)
        for asked, future in self._commands.values():
            if asked == worker and not future.done():
                future.set_exception(Unavailable(f"{worker} ended before it had done it", retry_after=1.0))

    def _disconnect(self, worker: WorkerId) -> None:
        link = self._links.pop(worker, None)
        if link is not None:
            link.close()

    async def _follow(self, socket: zmq.asyncio.Socket) -> None:
        async for envelope in transport.areceive(socket):
            self._take(envelope)

    def _take(self, envelope: Envelope) -> None:
        match envelope.message:
            case Report() as report:
                self._on_report(report)
            case CommandDone(command_id=number) as done:
                known = self._commands.get(number)
                if known is not None and not known[1].done():
                    known[1].set_result(done)
            case _:
                pass  # of requests: that is the gateways' affair

    def tell_homes(self, worker: WorkerId, models: list[ModelId]) -> None:
        """Which models live there, if it is up."""
        if (link := self._links.get(worker)) is not None:
            transport.asend(link.socket, Homes(epoch=self._epoch, models=[str(model) for model in models]))

    async def command(self, worker: WorkerId, command: Activate | Evict | SetLimits) -> list[str]:
        """Returns when it is done, with the models that have no room any more.

        Raises `Unavailable`, or with the worker's words `Conflict` or `EngineFailure`.
        """
        link = self._links.get(worker)
        if link is None:
            raise Unavailable(f"{worker}, where {command.model} lives, is not up", retry_after=1.0)
        number = next(self._next_command)
        future: asyncio.Future[CommandDone] = asyncio.get_running_loop().create_future()
        self._commands[number] = worker, future
        transport.asend(link.socket, msgspec.structs.replace(command, epoch=self._epoch, command_id=number))
        try:
            done = await asyncio.wait_for(future, COMMAND_SECONDS)
        except TimeoutError:
            if isinstance(command, Activate) and self._links.get(worker) is link:
                transport.asend(link.socket, Abandon(epoch=self._epoch, command_id=number))
            raise Unavailable(f"{worker} has not done it within {COMMAND_SECONDS:g} s") from None
        finally:
            del self._commands[number]
        if done.error is not None:
            raise Conflict(done.error, param="model") if done.conflicts else EngineFailure(done.error)
        return done.without_room
