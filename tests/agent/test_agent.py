"""Who has told the agent what, in which order."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq.asyncio

from prism import transport
from prism.agent.agent import Agent, child_specs
from prism.agent.children import Child
from prism.agent.rundir import RunDir
from prism.config import Config
from prism.demo.catalog import demo_model_path
from prism.errors import CheckpointError
from prism.messages import (
    Hello,
    Hung,
    ProcessEnded,
    ProcessUp,
    Ready,
    Role,
    WeightsFailed,
    WeightsHeld,
    WeightsWanted,
)
from prism.types import Bytes, ModelId
from tests.support.waiting import PATIENCE, eventually

pytestmark = pytest.mark.anyio

CONFIG = Config.model_validate(
    {
        "models": [{"name": "adder", "path": str(demo_model_path("adder"))}],
        "server": {"gateways": 2},
        "devices": [{}, {}],
        "host_memory": {"pack_ahead": False},
    }
)


class Listening:
    """An agent that hears its children, none of which it has started, and those children's sockets."""

    def __init__(self, parent: Path, config: Config = CONFIG) -> None:
        self.run_dir = RunDir(parent)
        with socket.socket() as listener:
            self.agent = Agent(config, self.run_dir, listener, listener)
        self._context = zmq.asyncio.Context()
        self._listener = asyncio.create_task(self.agent._listen())
        self._processes: list[zmq.asyncio.Socket] = []

    def child(self, name: str) -> Child:
        (child,) = [each for each in self.agent._children if each.spec.name == name]
        return child

    def process(self, name: str) -> zmq.asyncio.Socket:
        """The next incarnation of a child: how it calls the agent."""
        child = self.child(name)
        child.incarnation += 1
        child.has_ended = False
        address = transport.socket_address(self.run_dir.path, "agent")
        identity = transport.identity_of(name, child.incarnation)
        self._processes.append(transport.connect_dealer(self._context, address, identity))
        return self._processes[-1]

    def close(self) -> None:
        self._listener.cancel()
        self._context.destroy(linger=0)
        self.agent._context.destroy(linger=0)
        self.run_dir.close()


@pytest.fixture
async def listening(short_path: Path) -> AsyncIterator[Listening]:
    listening = Listening(short_path)
    yield listening
    listening.close()


def ready(role: Role, name: str, incarnation: int = 1) -> Ready:
    return Ready(role=role, name=name, incarnation=incarnation, address=f"ipc://{name}.{incarnation}")


def up(role: Role, name: str, incarnation: int = 1) -> ProcessUp:
    address = f"ipc://{name}.{incarnation}"
    return ProcessUp(role=role, name=name, incarnation=incarnation, address=address)


async def hears(process: zmq.asyncio.Socket) -> object:
    async with asyncio.timeout(PATIENCE):
        return (await anext(transport.areceive(process))).message


async def test_who_says_hello_is_told_who_is_up_and_later_who_comes_and_goes(listening: Listening) -> None:
    worker, gateway = listening.process("worker-0"), listening.process("gateway-0")
    transport.asend(worker, Hello(role=Role.WORKER, name="worker-0", incarnation=1))
    transport.asend(worker, ready(Role.WORKER, "worker-0"))
    transport.asend(gateway, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1))
    assert await hears(gateway) == up(Role.WORKER, "worker-0")
    child = listening.child("worker-0")
    listening.agent._child_ended(child)
    child.has_ended = True
    assert await hears(gateway) == ProcessEnded(role=Role.WORKER, name="worker-0", incarnation=1)
    again = listening.process("worker-0")
    transport.asend(again, Hello(role=Role.WORKER, name="worker-0", incarnation=2))
    transport.asend(again, ready(Role.WORKER, "worker-0", 2))
    assert await hears(gateway) == up(Role.WORKER, "worker-0", 2)


async def test_ready_counts_even_before_hello(listening: Listening) -> None:
    """A gateway is ready first. That was dropped, and its third death counted as a third failed start."""
    gateway, worker = listening.process("gateway-0"), listening.process("worker-0")
    transport.asend(worker, Hello(role=Role.WORKER, name="worker-0", incarnation=1))
    transport.asend(gateway, ready(Role.GATEWAY, "gateway-0"))
    transport.asend(gateway, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1))
    transport.asend(worker, ready(Role.WORKER, "worker-0"))
    assert await hears(gateway) == up(Role.WORKER, "worker-0")
    assert listening.child("gateway-0").ready_since is not None


async def test_strangers_and_the_dead_are_not_heard(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = listening.process("gateway-0")
    transport.asend(gateway, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1))
    dead = listening.process("worker-0")
    listening.child("worker-0").has_ended = True
    with caplog.at_level("ERROR", "prism"):
        transport.asend(dead, ready(Role.WORKER, "worker-0"))
        transport.asend(dead, ready(Role.WORKER, "worker-7"))
        transport.asend(dead, ready(Role.WORKER, "worker-0", 9))
        other = listening.process("worker-1")
        transport.asend(other, Hello(role=Role.WORKER, name="worker-1", incarnation=1))
        transport.asend(other, ready(Role.WORKER, "worker-1"))
        assert await hears(gateway) == up(Role.WORKER, "worker-1")  # and of nobody else before
    assert listening.child("worker-0").ready_since is None
    assert caplog.text.count("a stranger said Ready: worker-0.1") == 2


async def test_a_worker_that_hangs_is_killed_and_its_successor_is_not(
    listening: Listening, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The word may come when another one has taken its place."""
    killed: list[str] = []
    for child in listening.agent._children:
        monkeypatch.setattr(
            child, "signal", lambda number, name=child.spec.name: killed.append((name, number))
        )
    controller = listening.process("controller")
    for name in ("worker-0", "worker-1", "worker-1"):
        listening.process(name)
    for name, incarnation in (("worker-1", 1), ("worker-7", 1), ("worker-0", 1)):
        transport.asend(controller, Hung(name=name, incarnation=incarnation, silent_seconds=61.5))
    await eventually(lambda: killed, "somebody is killed")
    assert killed == [("worker-0", signal.SIGKILL)]
    assert "worker-0 has not reported for 62 s: it is killed" in caplog.text


def test_each_device_has_a_worker_and_gateways_share_a_socket() -> None:
    specs = child_specs(CONFIG, api_fd=5, admin_fd=6)
    assert [(spec.name, spec.listen_fd) for spec in specs] == [
        ("worker-0", None),
        ("worker-1", None),
        ("controller", 6),
        ("gateway-0", 5),
        ("gateway-1", 5),
    ]


class RecordingStore:
    """Packs at once what it can; `bad` it cannot."""

    def __init__(self) -> None:
        self.ahead: list[str] = []

    def held(self) -> dict[ModelId, Bytes]:
        return {ModelId("first"): Bytes(7)} if self.ahead else {}

    def holds(self, model: ModelId) -> bool:
        return False

    async def pack_ahead(self, model: ModelId) -> Bytes:
        self.ahead.append(model)
        if model == "bad":
            raise CheckpointError("holds nothing", file="bad")
        return Bytes(7)

    async def want(self, model: ModelId) -> Bytes:
        return Bytes(7)


async def test_models_are_packed_ahead_when_all_workers_have_their_memory(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [{"name": name, "path": "."} for name in ("first", "bad", "last")]
    models.append({"name": "preloaded", "path": ".", "preload": True})
    config = Config.model_validate({"models": models, "devices": [{}, {}]})
    listening = Listening(short_path, config)
    store = RecordingStore()
    listening.agent._store = store  # type: ignore[assignment]
    for i in range(2):
        assert not store.ahead
        listening.process(f"worker-{i}")
        listening.agent._child_ready(f"worker-{i}.1", ready(Role.WORKER, f"worker-{i}"))
        await asyncio.gather(*listening.agent._tasks)
    assert store.ahead == ["preloaded", "first", "bad", "last"]
    assert caplog.text.count("packing bad ahead failed") == 1
    listening.child("worker-0").has_ended = True
    listening.process("worker-0")
    listening.agent._child_ready("worker-0.2", ready(Role.WORKER, "worker-0", 2))
    await asyncio.gather(*listening.agent._tasks)
    assert len(store.ahead) == 4
    listening.close()


async def test_packing_ahead_can_be_switched_off(short_path: Path) -> None:
    config = Config.model_validate(
        {"models": [{"name": "m", "path": "."}], "host_memory": {"pack_ahead": False}}
    )
    listening = Listening(short_path, config)
    listening.process("worker-0")
    listening.agent._child_ready("worker-0.1", ready(Role.WORKER, "worker-0"))
    assert not listening.agent._tasks
    listening.close()


async def test_workers_are_told_what_is_held(short_path: Path) -> None:
    """Those that are there when it is packed, and those that come later."""
    config = Config.model_validate({"models": [{"name": "first", "path": "."}]})
    listening = Listening(short_path, config)
    listening.agent._store = RecordingStore()  # type: ignore[assignment]
    held = WeightsHeld(model="first", total_bytes=7)
    for incarnation in (1, 2):
        worker = listening.process("worker-0")
        transport.asend(worker, Hello(role=Role.WORKER, name="worker-0", incarnation=incarnation))
        transport.asend(worker, ready(Role.WORKER, "worker-0", incarnation))
        assert await hears(worker) == held
        listening.child("worker-0").has_ended = True
    listening.close()


async def test_gateways_are_told_what_cannot_be_packed_until_it_can(short_path: Path) -> None:
    """The log alone said that weights were missing."""
    config = Config.model_validate({"models": [{"name": name, "path": "."} for name in ("bad", "first")]})
    listening = Listening(short_path, config)
    listening.agent._store = RecordingStore()  # type: ignore[assignment]
    gateway, worker = listening.process("gateway-0"), listening.process("worker-0")
    transport.asend(gateway, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=1))
    await eventually(lambda: listening.agent._peers, "it is heard")
    transport.asend(worker, Hello(role=Role.WORKER, name="worker-0", incarnation=1))
    transport.asend(worker, ready(Role.WORKER, "worker-0"))
    assert await hears(gateway) == up(Role.WORKER, "worker-0")
    failed = WeightsFailed(model="bad", reason="bad: holds nothing")
    assert await hears(gateway) == failed
    listening.child("gateway-0").has_ended = True
    later = listening.process("gateway-0")
    transport.asend(later, Hello(role=Role.GATEWAY, name="gateway-0", incarnation=2))
    assert await hears(later) == up(Role.WORKER, "worker-0")
    assert await hears(later) == failed
    for model in (
        "bad",
        "bad",
        "first",
    ):  # it has been mended; of others and of what is so gateways hear nothing
        transport.asend(worker, WeightsWanted(model=model))
    assert await hears(later) == WeightsHeld(model="bad", total_bytes=7)
    transport.asend(worker, ready(Role.WORKER, "worker-0"))
    assert await hears(later) == up(Role.WORKER, "worker-0")
    listening.close()
