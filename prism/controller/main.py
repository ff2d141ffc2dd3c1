"""The controller process."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import zmq.asyncio

from prism import logs, transport
from prism.config import Config, ModelConfig
from prism.controller.admin import build_app
from prism.controller.placement import place
from prism.controller.service import ControllerService
from prism.controller.state import ControllerState, DeviceSize, ModelSize
from prism.errors import CheckpointError
from prism.messages import Hello, Ready, Role
from prism.modelspec import read_spec
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
    state = ControllerState(epoch=incarnation, homes=initial_homes(config))
    service = ControllerService(state, context, router, agent, identity)
    server = Server(uvicorn.Config(build_app(service), log_config=None, access_log=False, lifespan="off"))

    def stop() -> None:
        server.should_exit = True

    transport.asend(agent, Hello(role=Role.CONTROLLER, name=name, incarnation=incarnation))
    followers = [
        asyncio.create_task(service.follow_agent(stop)),
        asyncio.create_task(service.follow_gateways()),
    ]
    for task in followers:
        task.add_done_callback(lambda _: stop())
    ready = Ready(role=Role.CONTROLLER, name=name, incarnation=incarnation, address=address)
    transport.asend(agent, ready)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await server.serve(sockets=[socket.socket(fileno=listen_fd)])
    for task in followers:
        task.cancel()


def initial_homes(config: Config) -> dict[ModelId, WorkerId]:
    """A home for each model by the size of its weights."""
    devices = tuple(
        DeviceSize(WorkerId(f"worker-{i}"), device.memory, device.slab)
        for i, device in enumerate(config.devices)
    )
    models = tuple(
        ModelSize(
            ModelId(model.name),
            _weights_bytes(model),
            None if model.device is None else WorkerId(f"worker-{model.device}"),
        )
        for model in config.models
    )
    return place(models, devices)


def _weights_bytes(model: ModelConfig) -> int:
    """Size of the weights as the model's shape tells; 0 for a directory that cannot be read."""
    try:
        spec = read_spec(model.path, dtype=model.dtype, quantization=model.quantization)
    except CheckpointError as error:
        log.error("model %s: %s", model.name, error)
        return 0
    attention = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim * spec.hidden_size
    layer = attention + 3 * spec.hidden_size * spec.intermediate_size
    embeddings = (1 if spec.tied_embeddings else 2) * spec.vocab_size * spec.hidden_size
    return spec.num_layers * layer * spec.matrix_dtype.itemsize + embeddings * spec.dtype.itemsize
