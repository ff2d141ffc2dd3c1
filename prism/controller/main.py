"""The controller process."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import zmq.asyncio

from prism import logs, transport
from prism.clock import SystemClock
from prism.config import Config, ModelConfig
from prism.controller.admin import build_app
from prism.controller.links import WorkerLinks
from prism.controller.placement import first_homes
from prism.controller.planner import Planner
from prism.controller.service import ControllerService
from prism.controller.snapshot import DeviceState, ModelNeed
from prism.controller.state import ControllerState
from prism.controller.views import Catalog
from prism.errors import CheckpointError
from prism.messages import Hello, Ready, Role
from prism.metrics import Metrics
from prism.modelspec import ModelSpec, read_spec
from prism.types import ModelId, WorkerId

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals: a Ctrl-C reaches all processes, and the agent decides."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """They are handled by `_serve`."""
        yield


def run(run_dir: Path, name: str, incarnation: int, config: Config, listen_fd: int) -> int:
    """Serve until told to stop; the exit status."""
    logs.setup(config.server.log_level, config.server.log_json)
    asyncio.run(_serve(run_dir, name, incarnation, config, listen_fd))
    return 0


async def _serve(run_dir: Path, name: str, incarnation: int, config: Config, listen_fd: int) -> None:
    context = zmq.asyncio.Context()
    identity = transport.identity_of(name, incarnation)
    address = transport.socket_address(run_dir, identity)
    router = transport.bind_router(context, address)
    agent = transport.connect_dealer(context, transport.socket_address(run_dir, "agent"), identity)
    clock, catalog = SystemClock(), catalog_of(config)
    homes = first_homes(catalog.models, catalog.devices)
    speeds = {device.worker: device.speed for device in catalog.devices}
    state = ControllerState(epoch=incarnation, homes=homes, speeds=speeds)

    def planner(state: ControllerState, links: WorkerLinks, routes_changed: Callable[[], None]) -> Planner:
        return Planner(config.scheduling, catalog, state, links, routes_changed, clock.now, Metrics())

    watchdogs = {WorkerId(f"worker-{i}"): device.watchdog_seconds for i, device in enumerate(config.devices)}
    service = ControllerService(state, planner, context, router, agent, identity, clock, watchdogs)
    server = Server(uvicorn.Config(build_app(service), log_config=None, access_log=False, lifespan="off"))

    def stop() -> None:
        server.should_exit = True

    transport.asend(agent, Hello(role=Role.CONTROLLER, name=name, incarnation=incarnation))
    followers = [
        asyncio.create_task(service.follow_agent(stop)),
        asyncio.create_task(service.follow_gateways()),
        asyncio.create_task(service.follow_time()),
    ]
    for task in followers:
        task.add_done_callback(lambda _: stop())
    ready = Ready(role=Role.CONTROLLER, name=name, incarnation=incarnation, address=address)
    transport.asend(agent, ready)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await server.serve(sockets=[socket.socket(fileno=listen_fd)])
    for task in followers:
        if task.done():
            task.result()  # an error ends the process as one, and is logged
        task.cancel()


def catalog_of(config: Config) -> Catalog:
    """Models and devices as placement sees them before any worker has reported."""
    devices = tuple(
        DeviceState(WorkerId(f"worker-{i}"), device.memory, device.slab, device.speed)
        for i, device in enumerate(config.devices)
    )
    return Catalog(
        tuple(_need(model) for model in config.models),
        devices,
    )


def _need(model: ModelConfig) -> ModelNeed:
    """As far as the model's directory tells; one that cannot be read takes nothing."""
    try:
        spec = read_spec(model.path, dtype=model.dtype, quantization=model.quantization)
    except CheckpointError as error:
        log.error("model %s: %s", model.name, error)
        spec = None
    return ModelNeed(
        model=ModelId(model.name),
        weights_bytes=0 if spec is None else _weights_bytes(spec),
        kv_bytes_per_token=0 if spec is None else spec.kv_bytes_per_token,
        kv_floor_bytes=model.memory.floor,
        tpot=model.slo.tpot,
        ttft=model.slo.ttft,
        compute=model.expected_load or 0.0,
        device=None if model.device is None else WorkerId(f"worker-{model.device}"),
        is_wanted=model.is_loaded_at_start,
        is_pinned=model.pinned,
    )


def _weights_bytes(spec: ModelSpec) -> int:
    """Size of the weights as the model's shape tells."""
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.hidden_size
    layer = attention + 3 * spec.hidden_size * spec.intermediate_size
    embeddings = (1 if spec.tied_embeddings else 2) * spec.vocab_size * spec.hidden_size
    positions = spec.max_position * spec.head_dim * 4  # the rotary table, in fp32
    return spec.num_layers * layer * spec.matrix_dtype.itemsize + embeddings * spec.dtype.itemsize + positions
