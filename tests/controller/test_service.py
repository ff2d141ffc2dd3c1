"""The controller's connections, with a fake agent and fake workers behind real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from prism.controller import service as service_module
from prism.controller.service import ControllerService
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
    Role,
    Route,
    Routes,
    SetLimits,
    Stop,
)
from prism.transport import areceive, asend, bind_router, connect_dealer, socket_address
from prism.types import ModelId, WorkerId
from tests.controller.reports import report
from tests.gateway.processes import Peer

pytestmark = pytest.mark.anyio

A = ModelId("a")
HOME = WorkerId("worker-0")
EPOCH = 7


class World:
    """A controller, the agent that it follows, and whoever connects."""

    def __init__(self, run_dir: Path) -> None:
        self.context = zmq.asyncio.Context()
        self.run_dir = run_dir
        self.agent = Peer(self.context, run_dir, "agent")
        self.address = socket_address(run_dir, "controller.1")
        router = bind_router(self.context, self.address)
        agent = connect_dealer(self.context, socket_address(run_dir, "agent"), "controller.1")
        state = ControllerState(epoch=EPOCH, homes={A: HOME})
        self.service = ControllerService(state, self.context, router, agent, "controller.1")
        self.is_stopped = asyncio.Event()
        self.tasks = [
            asyncio.create_task(self.service.follow_agent(self.is_stopped.set)),
            asyncio.create_task(self.service.follow_gateways()),
        ]
        self.peers = [self.agent]
        asend(agent, Hello(role=Role.CONTROLLER, name="controller", incarnation=1))

    async def until(self, condition: object) -> None:
        async with asyncio.timeout(10):
            while not condition():  # type: ignore[operator]
                await asyncio.sleep(0.001)

    async def worker(self, incarnation: int = 1) -> Peer:
        """A worker that is up, and to which the controller has connected."""
        worker = Peer(self.context, self.run_dir, f"worker-0.{incarnation}")
        self.peers.append(worker)
        await self.until(lambda: self.agent.sender)
        up = {"role": Role.WORKER, "name": "worker-0", "incarnation": incarnation}
        self.agent.say(ProcessUp(**up, address=worker.address))
        await self.until(lambda: worker.heard)
        assert worker.heard.pop() == Hello(role=Role.CONTROLLER, name="controller", incarnation=1)
        return worker

    def worker_ends(self, incarnation: int = 1) -> None:
        self.agent.say(ProcessEnded(role=Role.WORKER, name="worker-0", incarnation=incarnation))

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for peer in self.peers:
            peer.close()
        self.context.destroy(linger=0)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    await world.close()


async def command(world: World, worker: Peer) -> Activate | Evict | SetLimits:
    """The next one that the worker hears."""
    await world.until(lambda: worker.heard)
    heard = worker.heard.pop(0)
    assert isinstance(heard, Activate | Evict | SetLimits)
    return heard


def done(heard: Activate | Evict | SetLimits, error: str | None = None) -> CommandDone:
    return CommandDone(command_id=heard.command_id, worker="worker-0", error=error)


async def test_gateways_get_the_routes_when_they_come_and_when_they_ask(world: World) -> None:
    gateway = connect_dealer(world.context, world.address, "gateway-0.1")
    routes = Routes(epoch=EPOCH, version=0, routes=[Route(model="a", workers=["worker-0"])])
    for message in (Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1), Demand(model="a")):
        asend(gateway, message)
        assert (await anext(areceive(gateway))).message == routes
    gateway.close(linger=0)


async def test_reports_are_kept_as_long_as_their_worker_lives(world: World) -> None:
    worker = await world.worker()
    worker.say(report("worker-0", num_free_slabs=3))
    await world.until(lambda: world.service.state.reports)
    world.worker_ends()
    await world.until(lambda: not world.service.state.reports)
    again = await world.worker(incarnation=2)
    again.say(report("worker-0", incarnation=2))
    await world.until(lambda: world.service.state.reports)


async def test_commands_carry_the_epoch_and_return_when_they_are_done(world: World) -> None:
    worker = await world.worker()
    for call, kind in (
        (world.service.load(A, pinned=True), Activate),
        (world.service.unload(A), Evict),
        (world.service.set_limits(A, 5, None), SetLimits),
    ):
        task = asyncio.create_task(call)
        heard = await command(world, worker)
        assert isinstance(heard, kind) and heard.epoch == EPOCH and heard.model == "a"
        assert not task.done()
        worker.say(CommandDone(command_id=heard.command_id + 100, worker="worker-0"))  # of nobody's
        worker.say(done(heard))
        await task


async def test_what_a_worker_refuses_is_an_error_with_its_words(world: World) -> None:
    """That a model is in use was a 500, as if the server were broken."""
    worker = await world.worker()
    for call, kind in ((world.service.unload(A), Conflict), (world.service.load(A), EngineFailure)):
        task = asyncio.create_task(call)
        worker.say(done(await command(world, worker), "model a has unfinished requests"))
        with pytest.raises(kind, match="unfinished requests"):
            await task


async def test_a_floor_beyond_the_device_is_refused(world: World) -> None:
    """It was accepted, and all other models then had no memory at all."""
    worker = await world.worker()
    worker.say(report("worker-0"))
    await world.until(lambda: world.service.state.reports)
    with pytest.raises(InvalidRequest, match="more than the memory"):
        await world.service.set_limits(A, 8 * 2**21 + 1, None)
    task = asyncio.create_task(world.service.set_limits(A, 8 * 2**21, None))
    worker.say(done(await command(world, worker)))
    await task


async def test_without_a_worker_a_command_fails_at_once(world: World) -> None:
    with pytest.raises(Unavailable, match="worker-0, where a lives, is not up"):
        await world.service.load(A)
    await world.worker()
    world.worker_ends()
    await world.until(lambda: not world.service._links)
    with pytest.raises(Unavailable):
        await world.service.load(A)


async def test_a_worker_that_dies_fails_what_was_asked_of_it(world: World) -> None:
    worker = await world.worker()
    tasks = [asyncio.create_task(world.service.load(A)) for _ in range(3)]
    for _ in tasks:
        await command(world, worker)
    world.worker_ends()
    for task in tasks:
        with pytest.raises(Unavailable, match="worker-0 ended before it had done it"):
            await task


async def test_a_worker_that_never_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "COMMAND_SECONDS", 0.01)
    worker = await world.worker()
    with pytest.raises(Unavailable, match="has not done it within"):
        await world.service.load(A)
    worker.say(done(await command(world, worker)))  # too late, which harms nobody
    task = asyncio.create_task(world.service.unload(A))
    monkeypatch.setattr(service_module, "COMMAND_SECONDS", 10.0)
    worker.say(done(await command(world, worker)))
    await task


async def test_stop(world: World) -> None:
    await world.until(lambda: world.agent.sender)
    world.agent.say(Stop(grace=1))
    async with asyncio.timeout(10):
        await world.is_stopped.wait()
