"""A gateway process, from its start to its exit code."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvicorn
import uvloop
from starlette.types import ASGIApp

from prism import logs
from prism.clock import SystemClock
from prism.config import Config
from prism.gateway.app import create_app
from prism.gateway.heads import HeadProtocol
from prism.gateway.links import ProcessLinks
from prism.gateway.loop_watch import watch_loop
from prism.gateway.service import Gateway
from prism.metrics import Metrics
from prism.transport import socket_address

if TYPE_CHECKING:
    from uvicorn._types import ASGIApplication

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 5  # for answers that have ended but are still on their way to a client


def run(run_dir: Path, name: str, incarnation: int, config: Config, listen_fd: int) -> int:
    """Serve HTTP on the listening socket `listen_fd` until the agent says Stop; the exit code.

    Called in a process of its own. 0 after a Stop or a signal, 1 if the agent has gone.
    """
    logs.setup(config.server.log_level, config.server.log_json)
    listener = socket.socket(fileno=listen_fd)
    code: int = uvloop.run(serve(run_dir, name, incarnation, config, listener))
    return code


async def serve(run_dir: Path, name: str, incarnation: int, config: Config, listener: socket.socket) -> int:
    """The same on a loop that runs already."""
    links = ProcessLinks(name, incarnation, socket_address(run_dir, "agent"))
    gateway = Gateway(config, links, SystemClock(), Metrics())
    links.listener = gateway

    def on_started() -> None:
        links.ready()
        gateway.text_models.start()

    server = Server(create_app(gateway), on_started)
    _on_signals(lambda: gateway.begin_stop(config.server.shutdown_grace))
    stopped = asyncio.create_task(gateway.stopped())
    stopped.add_done_callback(lambda _: server.exit_soon())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    tasks = (
        serving,
        asyncio.create_task(gateway.run_timers()),
        asyncio.create_task(links.run(gateway.begin_stop)),
        asyncio.create_task(watch_loop(name, gateway.clock, gateway.metrics)),
    )
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
        return 0 if serving in ended else 1
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)
        server.close(listener)
        gateway.close()
        links.close()


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals; says when it listens."""

    def __init__(self, app: ASGIApp, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                cast("ASGIApplication", app),
                http=HeadProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self._on_started = on_started
        self.servers = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self._on_started()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """They are handled by `serve`."""
        yield

    def exit_soon(self) -> None:
        """Let `serve` return once the answers have left."""
        self.should_exit = True

    def close(self, listener: socket.socket) -> None:
        """Take no more connections, however the end came about."""
        for server in self.servers:
            server.close()
        listener.close()
