"""Runs a server in this process: ports, run directory, agent."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from prism import logs
from prism.agent.agent import Agent
from prism.agent.rundir import RunDir
from prism.config import Config
from prism.errors import ConfigError


def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit status. Raises `ConfigError` when a port is taken."""
    logs.setup(config.server.log_level, config.server.log_json)
    server = config.server
    with (
        listen(server.host, server.port, "server.port") as api,
        listen(server.admin_host, server.admin_port, "server.admin_port") as admin,
    ):
        run_dir = RunDir()
        try:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(run_dir.metrics)
            _write_private(run_dir.config, config.model_dump_json())
            return asyncio.run(Agent(config, run_dir, api, admin).run())
        finally:
            run_dir.close()


def listen(host: str, port: int, field: str) -> socket.socket:
    """A listening socket that children inherit. Raises `ConfigError` naming the field."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError([f"{field}: cannot listen on {host}:{port}: {error.strerror}"]) from None
    return listener


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
