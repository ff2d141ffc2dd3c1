"""A gateway on the test's loop and a worker on a thread, as in production but for their driver and agent."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import zmq.asyncio

from prism.clock import SystemClock
from prism.config import Config
from prism.gateway.main import serve
from prism.memory.driver import Driver
from prism.memory.pool import SlabPool
from prism.messages import (
    AnyMessage,
    Hello,
    ProcessEnded,
    ProcessUp,
    Ready,
    Role,
    Route,
    Routes,
    Stop,
    WeightsReady,
    WeightsWanted,
)
from prism.metrics import Metrics
from prism.transport import asend, identity_of
from prism.types import Bytes, Incarnation, ModelId, WorkerId
from prism.weights.client import PackedWeights, pack_here
from prism.weights.link import ThreadLink
from prism.weights.protocol import WeightSource
from prism.worker.gauges import Gauges
from prism.worker.loop import Worker
from prism.worker.main import Process, Sockets, ThreadJobs
from prism.worker.open_device import cpu_device
from prism.worker.outside import Outside
from tests.gateway.processes import Peer
from tests.support.waiting import PATIENCE, eventually

NAME = "worker-0"


class CheckedWorker(Worker):
    """Its books are checked whenever it has nothing more to do."""

    def advance(self) -> bool:
        more = super().advance()
        if not more:
            self.check()
        return more


class WorkerThread:
    """One incarnation of a worker, over any driver. `stop` proves that it has lost no memory."""

    def __init__(self, config: Config, run_dir: Path, driver: Driver, incarnation: int) -> None:
        (device,) = config.devices
        self._paths = {model.name: model.path for model in config.models}
        pool = SlabPool(driver, Bytes(device.slab), device.memory // device.slab)
        self._device = cpu_device(driver, pool, "cpu:0")
        self._jobs = ThreadJobs()
        self._link = ThreadLink(self._device.backend.copier)
        sockets = Sockets(run_dir, NAME, incarnation)
        self.address, self.incarnation = sockets.address, incarnation
        self._worker = CheckedWorker(
            config,
            device,
            self._device,
            Outside(sockets, self._jobs, self._fetch, self._link, SystemClock().now),
            name=WorkerId(NAME),
            incarnation=Incarnation(incarnation),
        )
        self._sockets = sockets
        self._process = Process(self._worker, sockets, self._jobs, Gauges(Metrics(), NAME))
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _fetch(self, model: ModelId) -> PackedWeights:
        return pack_here(WeightSource(model=model, path=self._paths[model]))

    def _run(self) -> None:
        try:
            self._process.run()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """End the thread, then give all memory back; fails if any is missing, or if the worker had failed."""
        self._process.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        self._evict_all()
        while any(model.arena_slabs or model.load is not None for model in self._worker.models.values()):
            for event in self._jobs.finished():
                self._worker.on_job(event)
            self._evict_all()  # a load may just have ended well
        self._link.close()
        self._worker.check()
        self._worker._stepper.check()
        for model in self._worker.models.values():
            if model.arena is not None:
                model.arena.close()
        self._device.close()  # fails if a slab has an owner, or if the driver has given out anything else
        self._sockets.router.context.destroy(linger=0)
        os.close(self._jobs.wake)

    def _evict_all(self) -> None:
        for model in self._worker.models.values():
            if model.is_active:
                self._worker.evict(model)


class Agent(Peer):
    """Tells the gateway of one worker after the other. Packed weights are always there."""

    gateway: str | None = None

    def react(self, message: AnyMessage) -> None:
        match message:
            case Hello(role=Role.GATEWAY):
                self.gateway = self.sender
            case WeightsWanted(model=model):
                self.say(WeightsReady(model=model, total_bytes=0))
            case _:
                pass

    def tell(self, message: ProcessUp | ProcessEnded | Stop) -> None:
        """The gateway."""
        assert self.gateway is not None
        asend(self.socket, message, self.gateway)


class Controller(Peer):
    """All models live with the one worker."""

    models: tuple[str, ...] = ()

    def react(self, message: AnyMessage) -> None:
        if isinstance(message, Hello):
            routes = [Route(model=model, workers=[NAME]) for model in self.models]
            self.say(Routes(epoch=1, version=1, routes=routes))


class InProcess:
    """The gateway's address, and the workers that come and go."""

    def __init__(self, config: Config, run_dir: Path, agent: Agent, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._config = config
        self._run_dir = run_dir
        self._agent = agent
        self._num_workers = 0

    @asynccontextmanager
    async def worker(self, driver: Driver) -> AsyncIterator[WorkerThread]:
        """The next incarnation, over a driver."""
        self._num_workers += 1
        thread = WorkerThread(self._config, self._run_dir, driver, self._num_workers)
        who = {"role": Role.WORKER, "name": NAME, "incarnation": self._num_workers}
        self._agent.tell(ProcessUp(**who, address=thread.address))
        try:
            yield thread
        finally:
            self._agent.tell(ProcessEnded(**who))
            await asyncio.to_thread(thread.stop)


@asynccontextmanager
async def in_process(config: Config, run_dir: Path) -> AsyncIterator[InProcess]:
    """The gateway and those around it."""
    context = zmq.asyncio.Context()
    agent = Agent(context, run_dir, "agent")
    controller = Controller(context, run_dir, identity_of("controller", 1))
    controller.models = tuple(model.name for model in config.models)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    serving = asyncio.create_task(serve(run_dir, "gateway-0", 1, config, listener))
    try:
        is_ready = lambda: agent.gateway and any(isinstance(each, Ready) for each in agent.heard)  # noqa: E731
        await eventually(is_ready, "the gateway serves", pause=0.001)
        up = {"role": Role.CONTROLLER, "name": "controller", "incarnation": 1}
        agent.tell(ProcessUp(**up, address=controller.address))
        yield InProcess(config, run_dir, agent, port)
    finally:
        if agent.gateway is not None:
            agent.tell(Stop(grace=0))
            await serving
        serving.cancel()
        for peer in (agent, controller):
            peer.close()
        context.term()
