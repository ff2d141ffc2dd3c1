"""The controller's connections, with a fake agent and fake workers behind real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio

from prism.clock import ManualClock
from prism.config import SchedulingConfig
from prism.controller import links as links_module
from prism.controller.admin import describe
from prism.controller.links import WorkerLinks
from prism.controller.migration import Phase
from prism.controller.planner import Planner
from prism.controller.service import ControllerService
from prism.controller.silence import SILENT_SECONDS
from prism.controller.snapshot import DeviceState, Home, ModelNeed
from prism.controller.state import ControllerState
from prism.controller.views import Catalog
from prism.errors import Conflict, EngineFailure, InvalidRequest, Unavailable
from prism.messages import (
    Abandon,
    Activate,
    AnyMessage,
    CommandDone,
    Demand,
    Evict,
    Hello,
    Homes,
    Hung,
    ProcessEnded,
    ProcessUp,
    Role,
    Route,
    Routes,
    SetLimits,
    Stop,
)
from prism.metrics import Metrics
from prism.transport import areceive, asend, bind_router, connect_dealer, socket_address
from prism.types import MiB, ModelId, ModelState, Seconds, WorkerId
from tests.controller.reports import model_report, report
from tests.gateway.processes import Peer
from tests.support.waiting import PATIENCE, eventually

pytestmark = pytest.mark.anyio

A = ModelId("a")
HOME = WorkerId("worker-0")
EPOCH = 1
WATCHDOG = Seconds(30.0)


class WorkerPeer(Peer):
    """Keeps apart what it hears of homes."""

    homes: list[str] | None = None

    def react(self, message: AnyMessage) -> None:
        if isinstance(message, Homes):
            self.heard.remove(message)
            self.homes = message.models


class World:
    """A controller, the agent that it follows, and whoever connects."""

    preloaded: frozenset[ModelId] = frozenset()

    def __init__(self, run_dir: Path, epoch: int = 1) -> None:
        self.context = zmq.asyncio.Context()
        self.run_dir = run_dir
        self.agent = Peer(self.context, run_dir, "agent")
        self.address = socket_address(run_dir, "controller.1")
        router = bind_router(self.context, self.address)
        agent = connect_dealer(self.context, socket_address(run_dir, "agent"), "controller.1")
        self.clock, self.metrics = ManualClock(), Metrics()
        state = ControllerState(epoch=epoch, homes={A: (Home(HOME),)})
        self.service = ControllerService(
            state, self.planner, self.context, router, agent, "controller.1", self.clock, {HOME: WATCHDOG}
        )
        self.is_stopped = asyncio.Event()
        self.tasks = [
            asyncio.create_task(self.service.follow_agent(self.is_stopped.set)),
            asyncio.create_task(self.service.follow_gateways()),
            asyncio.create_task(self.service.follow_time()),
        ]
        self.peers = [self.agent]
        asend(agent, Hello(role=Role.CONTROLLER, name="controller", incarnation=1))

    def planner(
        self, state: ControllerState, links: WorkerLinks, routes_changed: Callable[[], None]
    ) -> Planner:
        devices = tuple(DeviceState(WorkerId(f"worker-{i}"), 16 * MiB, 2 * MiB) for i in range(2))
        catalog = Catalog((ModelNeed(A, 4 * MiB, is_wanted=A in self.preloaded),), devices)
        config = SchedulingConfig()
        return Planner(config, catalog, state, links, routes_changed, self.clock.now, self.metrics)

    async def until(self, condition: Callable[[], object]) -> None:
        await eventually(condition, "it is so", pause=0.001)

    async def worker(self, incarnation: int = 1, name: str = "worker-0") -> WorkerPeer:
        """A worker that is up, and to which the controller has connected."""
        worker = WorkerPeer(self.context, self.run_dir, f"{name}.{incarnation}")
        self.peers.append(worker)
        await self.until(lambda: self.agent.sender)
        up = {"role": Role.WORKER, "name": name, "incarnation": incarnation}
        self.agent.say(ProcessUp(**up, address=worker.address))
        await self.until(lambda: worker.heard)
        assert worker.heard.pop() == Hello(role=Role.CONTROLLER, name="controller", incarnation=1)
        return worker

    def worker_ends(self, incarnation: int = 1, name: str = "worker-0") -> None:
        self.agent.say(ProcessEnded(role=Role.WORKER, name=name, incarnation=incarnation))

    async def pass_time(self, seconds: float) -> None:
        """Ticks come every second; those of a moment that was jumped over come once."""
        self.clock.advance(seconds)
        for _ in range(10):
            await asyncio.sleep(0)

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


def done(
    heard: Activate | Evict | SetLimits, error: str | None = None, *, conflicts: bool = False
) -> CommandDone:
    return CommandDone(command_id=heard.command_id, worker="worker-0", error=error, conflicts=conflicts)


class Gateway:
    """Keeps the newest routes that it was sent."""

    def __init__(self, world: World) -> None:
        self.socket = connect_dealer(world.context, world.address, "gateway-0.1")
        asend(self.socket, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1))
        self.routes: Routes | None = None
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for envelope in areceive(self.socket):
            assert isinstance(envelope.message, Routes)
            assert self.routes is None or envelope.message.version >= self.routes.version
            self.routes = envelope.message

    @property
    def route(self) -> tuple[list[str], list[str]]:
        if self.routes is None:
            return [], []
        (route,) = self.routes.routes
        return route.workers, route.draining

    def close(self) -> None:
        self._reader.cancel()
        self.socket.close(linger=0)


@pytest.fixture
async def gateway(world: World) -> AsyncIterator[Gateway]:
    gateway = Gateway(world)
    yield gateway
    gateway.close()


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
    """A conflict is no failure of the server: that a model is in use was a 500, and a broken load a 409."""
    worker = await world.worker()
    for kind, conflicts in ((Conflict, True), (EngineFailure, False)):
        for call in (world.service.unload(A), world.service.load(A)):
            task = asyncio.create_task(call)
            worker.say(done(await command(world, worker), "the worker's words", conflicts=conflicts))
            with pytest.raises(kind, match="the worker's words"):
                await task


async def test_a_pin_tells_who_has_no_room(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It said nothing, and neither did the log."""
    worker = await world.worker()
    pin = asyncio.create_task(world.service.load(A, pinned=True))
    worker.say(msgspec.structs.replace(done(await command(world, worker)), without_room=["b", "c"]))
    assert await pin == ["b", "c"]
    assert "model a is pinned and leaves no room for b, c" in caplog.text
    assert world.service.plan is None
    await world.pass_time(2.0)  # the next look that comes by itself would be after ten
    await world.until(lambda: world.service.plan is not None)
    limits = asyncio.create_task(world.service.set_limits(A, 0, None))
    worker.say(msgspec.structs.replace(done(await command(world, worker)), without_room=["b"]))
    assert await limits == ["b"]


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
    await world.until(lambda: not world.service.links.up)
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
    monkeypatch.setattr(links_module, "COMMAND_SECONDS", 0.01)
    worker = await world.worker()
    with pytest.raises(Unavailable, match="has not done it within"):
        await world.service.load(A)
    heard = await command(world, worker)
    await world.until(lambda: worker.heard)
    assert worker.heard.pop() == Abandon(epoch=EPOCH, command_id=heard.command_id), "it stayed in force"
    worker.say(done(heard))  # too late, which harms nobody
    task = asyncio.create_task(world.service.unload(A))
    monkeypatch.setattr(links_module, "COMMAND_SECONDS", 10.0)
    worker.say(done(await command(world, worker)))
    await task


async def test_stop(world: World) -> None:
    await world.until(lambda: world.agent.sender)
    world.agent.say(Stop(grace=1))
    async with asyncio.timeout(PATIENCE):
        await world.is_stopped.wait()


# --- moving ---------------------------------------------------------------------------------------------


async def both(world: World) -> tuple[WorkerPeer, WorkerPeer]:
    """Two workers; the model is active on the first."""
    first, second = await world.worker(), await world.worker(name="worker-1")
    first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE, num_running=1)))
    second.say(report("worker-1", model_report("a")))
    await world.until(lambda: len(world.service.state.reports) == 2)
    return first, second


async def answered(world: World, worker: Peer, kind: type[object]) -> Activate | Evict | SetLimits:
    heard = await command(world, worker)
    assert isinstance(heard, kind)
    worker.say(done(heard))
    return heard


async def test_a_model_moves_while_its_source_serves(world: World, gateway: Gateway) -> None:
    first, second = await both(world)
    task = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    activate = await command(world, second)
    assert isinstance(activate, Activate) and gateway.route == (["worker-0"], [])
    with pytest.raises(Conflict, match="is being moved"):
        await world.service.move(A, 1)
    second.say(done(activate))
    assert await task == "worker-1"
    await world.until(lambda: gateway.route == (["worker-1"], ["worker-0"]))
    first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE, num_running=1), num_free_slabs=1))
    await world.until(lambda: world.service.state.reports[HOME].num_free_slabs == 1)
    assert not first.heard, "it has a request"
    world.clock.advance(2)
    first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE)))
    evict = await answered(world, first, Evict)
    assert isinstance(evict, Evict) and not evict.returns
    await world.until(lambda: gateway.route == (["worker-1"], []))
    text = world.metrics.text().decode()
    assert 'prism:migrations_total{model_name="a",result="done"} 1.0' in text


async def test_a_source_that_does_not_drain_returns_its_requests(world: World, gateway: Gateway) -> None:
    first, second = await both(world)
    task = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    await answered(world, second, Activate)
    await task
    await world.pass_time(59)
    assert not first.heard
    await world.pass_time(2)
    evict = await command(world, first)
    assert isinstance(evict, Evict) and evict.returns
    first.say(done(evict))
    await world.until(lambda: gateway.route == (["worker-1"], []))


async def test_an_eviction_that_finds_a_request_is_tried_again(world: World, gateway: Gateway) -> None:
    """The worker's refusal had become a conflict, which nobody heard: the source kept the model."""
    first, second = await both(world)
    task = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    await answered(world, second, Activate)
    await task
    world.clock.advance(2)
    first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE)))
    evict = await command(world, first)
    assert isinstance(evict, Evict) and not evict.returns
    first.say(done(evict, "model a has unfinished requests", conflicts=True))
    await world.until(lambda: world.service.state.migrations[A].phase is Phase.DRAINING)
    await world.pass_time(61)
    evict = await command(world, first)
    assert isinstance(evict, Evict) and evict.returns
    first.say(done(evict))
    await world.until(lambda: gateway.route == (["worker-1"], []))


async def test_a_target_that_fails_leaves_everything_as_it_was(world: World, gateway: Gateway) -> None:
    _, second = await both(world)
    task = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    second.say(done(await command(world, second), "no such tensor"))
    with pytest.raises(EngineFailure, match="no such tensor"):
        await task
    assert gateway.route == (["worker-0"], []) and not world.service.state.migrations


async def test_a_target_that_dies_gives_the_model_back(world: World, gateway: Gateway) -> None:
    first, second = await both(world)
    task = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    await answered(world, second, Activate)
    await task
    world.worker_ends(name="worker-1")
    await world.until(lambda: gateway.route == (["worker-0"], []))
    assert not first.heard


async def test_limits_and_pins_travel_with_the_model(world: World) -> None:
    first, second = await both(world)
    fields = {"state": ModelState.ACTIVE, "kv_floor_bytes": 5, "kv_limit_bytes": 9, "pinned": True}
    first.say(report("worker-0", model_report("a", **fields), num_free_slabs=1))
    await world.until(lambda: world.service.state.reports[HOME].num_free_slabs == 1)
    task = asyncio.create_task(world.service.move(A, 1))
    limits = await answered(world, second, SetLimits)
    assert isinstance(limits, SetLimits) and (limits.kv_floor_bytes, limits.kv_limit_bytes) == (5, 9)
    activate = await answered(world, second, Activate)
    assert isinstance(activate, Activate) and activate.pinned is True
    await task


async def test_moves_that_cannot_be(world: World) -> None:
    with pytest.raises(Unavailable, match="worker-1 is not up"):
        await world.service.move(A, 1)
    with pytest.raises(InvalidRequest, match="there are 2 devices"):
        await world.service.move(A, 2)
    await both(world)
    assert await world.service.move(A, 0) == "worker-0", "it lives there"


async def test_what_is_not_in_memory_moves_at_once(world: World, gateway: Gateway) -> None:
    await world.worker(name="worker-1")
    assert await world.service.move(A, 1) == "worker-1"
    await world.until(lambda: gateway.route == (["worker-1"], []))


async def test_a_demand_for_a_model_whose_home_is_away_gets_another(world: World, gateway: Gateway) -> None:
    await world.until(lambda: gateway.routes)
    asend(gateway.socket, Demand(model="a"))
    await world.worker(name="worker-1")
    assert gateway.route == (["worker-0"], []), "nobody was up"
    asend(gateway.socket, Demand(model="a"))
    await world.until(lambda: gateway.route == (["worker-1"], []))
    await world.worker()
    asend(gateway.socket, Demand(model="a"))
    await world.until(lambda: world.service.links.up == {"worker-0", "worker-1"})
    assert gateway.route == (["worker-1"], [])


async def test_an_unload_calls_a_migration_off(world: World) -> None:
    first, second = await both(world)
    moving = asyncio.create_task(world.service.move(A, 1))
    await answered(world, second, SetLimits)
    await command(world, second)
    unloading = asyncio.create_task(world.service.unload(A))
    with pytest.raises(Conflict, match="called off by another command"):
        await moving
    await answered(world, second, Evict)
    await answered(world, first, Evict)
    await unloading


async def test_a_later_controller_says_nothing_before_it_has_heard_from_all(tmp_path: Path) -> None:
    """It would send requests to where its predecessor's models had been, and load them a second time."""
    world = World(tmp_path, epoch=2)
    gateway = Gateway(world)
    first, second = await world.worker(), await world.worker(name="worker-1")
    first.say(report("worker-0", model_report("a")))
    await world.until(lambda: len(world.service.state.reports) == 1)
    assert gateway.routes is None
    second.say(report("worker-1", model_report("a", state=ModelState.ACTIVE)))
    await world.until(lambda: gateway.routes)
    assert gateway.route == (["worker-1"], [])
    gateway.close()
    await world.close()


async def test_a_later_controller_does_not_wait_for_ever(tmp_path: Path) -> None:
    world = World(tmp_path, epoch=2)
    gateway = Gateway(world)
    await world.until(lambda: world.service._gateways)
    assert gateway.routes is None
    await world.pass_time(2.5)
    await world.until(lambda: gateway.routes)
    gateway.close()
    await world.close()


async def test_preloaded_models_are_loaded_at_home_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker loaded each of them."""
    monkeypatch.setattr(World, "preloaded", frozenset((A,)))
    world = World(tmp_path)
    first, second = await world.worker(), await world.worker(name="worker-1")
    second.say(report("worker-1", model_report("a")))
    first.say(report("worker-0", model_report("a")))
    assert isinstance(await command(world, first), Activate)
    assert not second.heard
    await world.close()


async def test_what_was_unloaded_stays_away_when_its_worker_is_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came back with the worker, by itself: ahead of requests, or since it is preloaded or pinned."""
    monkeypatch.setattr(World, "preloaded", frozenset((A,)))
    world = World(tmp_path)
    gone = model_report("a", is_sent_away=True)
    first = await world.worker()
    first.say(report("worker-0", gone))
    await world.until(lambda: world.service.state.reports)
    world.worker_ends()
    second = await world.worker(2)
    second.say(report("worker-0", model_report("a", state=ModelState.FETCHING), incarnation=2))
    evict = await command(world, second)
    assert isinstance(evict, Evict) and not evict.returns and not evict.moved
    second.say(CommandDone(command_id=evict.command_id, worker="worker-0"))
    second.say(report("worker-0", gone, incarnation=2))
    await world.until(lambda: world.service.state.report_of(HOME, A) == gone)
    await world.pass_time(1)
    assert not second.heard
    await world.close()


async def test_what_has_been_asked_for_since_it_was_unloaded_is_preloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "preloaded", frozenset((A,)))
    world = World(tmp_path)
    first = await world.worker()
    first.say(report("worker-0", model_report("a", is_sent_away=True)))
    first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE)))
    await world.until(lambda: world.service.state.resident(A))
    world.worker_ends()
    second = await world.worker(2)
    second.say(report("worker-0", model_report("a"), incarnation=2))
    assert isinstance(await command(world, second), Activate)
    await world.close()


async def test_workers_hear_which_models_live_with_them(world: World, gateway: Gateway) -> None:
    first, second = await both(world)
    await world.until(lambda: first.homes == ["a"] and second.homes == [])
    active = model_report("a", state=ModelState.ACTIVE)
    second.say(report("worker-1", active))  # as a later controller finds it
    await world.until(lambda: second.homes == ["a"])


async def test_a_worker_that_stands_still_is_told_once(
    world: World, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last report was shown as if it were of this moment, and everything was said to be well."""
    still, well = await world.worker(), await world.worker(name="worker-1")
    still.say(report("worker-0", model_report("a")))
    well.say(report("worker-1", model_report("a")))
    await world.until(lambda: len(world.service.state.reports) == 2)
    for second in range(int(SILENT_SECONDS) + 3):
        well.say(report("worker-1", model_report("a", num_started=second)))
        await world.until(lambda n=second: num_started(world, "worker-1") == n)
        await world.pass_time(1.0)
    await world.until(lambda: gateway.routes is not None and gateway.routes.silent == ["worker-0"])
    assert [device["is_silent"] for device in describe(world.service)["devices"]] == [True, False]
    assert caplog.text.count("has not reported") == 1
    still.say(report("worker-0", model_report("a")))
    await world.until(lambda: gateway.routes is not None and not gateway.routes.silent)
    assert "worker-0 reports again" in caplog.text
    assert not any(device["is_silent"] for device in describe(world.service)["devices"])


async def test_a_silent_worker_that_ends_is_silent_no_more(world: World, gateway: Gateway) -> None:
    await world.worker()
    await world.until(lambda: gateway.routes is not None)
    for _ in range(int(SILENT_SECONDS) + 3):
        await world.pass_time(1.0)
    await world.until(lambda: gateway.routes is not None and gateway.routes.silent == ["worker-0"])
    world.worker_ends()
    await world.until(lambda: gateway.routes is not None and not gateway.routes.silent)


async def test_the_agent_is_told_of_each_incarnation_that_hangs(world: World) -> None:
    """Once, and never of a worker that nobody watches."""
    await world.worker(name="worker-1")
    for incarnation in (1, 2):
        await world.worker(incarnation)
        told = len(world.agent.heard)
        for _ in range(int(WATCHDOG) - 1):
            await world.pass_time(1.0)
        assert len(world.agent.heard) == told
        for _ in range(5):
            await world.pass_time(1.0)
        await world.until(lambda told=told: len(world.agent.heard) > told)
        hung = Hung(name="worker-0", incarnation=incarnation, silent_seconds=30.0)
        assert world.agent.heard[told:] == [hung]
        world.worker_ends(incarnation)


def num_started(world: World, worker: str) -> int:
    found = world.service.state.report_of(WorkerId(worker), A)
    return -1 if found is None else found.num_started


async def test_placement_looks_now_and_then(world: World, gateway: Gateway) -> None:
    """A model that fills its device gets another one."""
    first, second = await both(world)
    for now in range(61):
        busy = {"num_started": 10 * now, "decoded_tokens": 100 * now}
        busy |= {"device_seconds": float(now), "needed_seconds": float(now)}
        first.say(report("worker-0", model_report("a", state=ModelState.ACTIVE, **busy), num_free_slabs=now))
        await world.until(lambda now=now: world.service.state.reports[HOME].num_free_slabs == now)
        await world.pass_time(1)
    await answered(world, second, SetLimits)
    await answered(world, second, Activate)
    await world.until(lambda: gateway.route == (["worker-0", "worker-1"], []))
