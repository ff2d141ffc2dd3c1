"""The other processes, on the test's own loop, behind real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import zmq.asyncio

from prism.config import Config
from prism.gateway.main import serve
from prism.messages import (
    AnyMessage,
    CancelChoice,
    Demand,
    Hello,
    ProcessEnded,
    ProcessUp,
    Ready,
    Role,
    Stop,
    Submit,
)
from prism.transport import areceive, asend, bind_router, socket_address
from tests.gateway.fakes import Script, routes
from tests.support.waiting import eventually


class Peer:
    """Listens like one process, keeps what it hears, and reacts."""

    def __init__(self, context: zmq.asyncio.Context, run_dir: Path, file: str) -> None:
        self.address = socket_address(run_dir, file)
        self.heard: list[AnyMessage] = []
        self.sender: str | None = None
        self.socket = bind_router(context, self.address)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for sender, message in areceive(self.socket):
            self.sender = sender
            self.heard.append(message)
            self.react(message)

    def react(self, message: AnyMessage) -> None:
        """Nothing, unless a subclass knows better."""

    def say(self, message: AnyMessage) -> None:
        assert self.sender is not None
        asend(self.socket, message, self.sender)

    def close(self) -> None:
        self._reader.cancel()
        self.socket.close(linger=0)


class FakeWorker(Peer):
    """Answers each request by its script."""

    def __init__(
        self, context: zmq.asyncio.Context, run_dir: Path, name: str, incarnation: int, script: Script
    ) -> None:
        super().__init__(context, run_dir, f"{name}.{incarnation}")
        self.name, self.incarnation, self.script = name, incarnation, script

    def react(self, message: AnyMessage) -> None:
        if isinstance(message, Submit):
            for answer in self.script.answers(message, self.incarnation):
                self.say(answer)

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.heard if isinstance(message, Submit)]

    @property
    def cancels(self) -> list[CancelChoice]:
        return [message for message in self.heard if isinstance(message, CancelChoice)]


class FakeController(Peer):
    """Routes everything to w0 when a gateway says Hello, if `eager`, or when there is a demand."""

    eager = True

    def react(self, message: AnyMessage) -> None:
        if (isinstance(message, Hello) and self.eager) or isinstance(message, Demand):
            self.say(routes("w0"))


@dataclass
class Cluster:
    """A gateway that serves HTTP on a real port, and its fake neighbours."""

    context: zmq.asyncio.Context
    run_dir: Path
    agent: Peer
    port: int
    serving: "asyncio.Task[int]"
    peers: list[Peer] = field(default_factory=list)

    def start_worker(self, script: Script, incarnation: int = 1, name: str = "w0") -> FakeWorker:
        worker = FakeWorker(self.context, self.run_dir, name, incarnation, script)
        self.peers.append(worker)
        self.agent.say(
            ProcessUp(role=Role.WORKER, name=name, incarnation=incarnation, address=worker.address)
        )
        return worker

    def kill_worker(self, worker: FakeWorker) -> None:
        worker.close()
        self.agent.say(ProcessEnded(role=Role.WORKER, name=worker.name, incarnation=worker.incarnation))

    def start_controller(self, incarnation: int = 1) -> FakeController:
        controller = FakeController(self.context, self.run_dir, f"controller.{incarnation}")
        self.peers.append(controller)
        up = ProcessUp(
            role=Role.CONTROLLER, name="controller", incarnation=incarnation, address=controller.address
        )
        self.agent.say(up)
        return controller

    def stop(self, grace: float) -> None:
        self.agent.say(Stop(grace=grace))

    async def wait(self, condition: Callable[[], object]) -> None:
        """For what takes real time: sockets."""
        await eventually(condition, "it is so", pause=0.001)


@asynccontextmanager
async def cluster(config: Config, run_dir: Path) -> AsyncIterator[Cluster]:
    context = zmq.asyncio.Context()
    agent = Peer(context, run_dir, "agent")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(serve(run_dir, "g0", 1, config, listener))
    result = Cluster(context, run_dir, agent, port, serving)
    await result.wait(lambda: any(isinstance(message, Ready) for message in agent.heard))
    try:
        yield result
    finally:
        if not serving.done():
            result.stop(0)
            await serving
        for peer in (agent, *result.peers):
            peer.close()
        context.term()
