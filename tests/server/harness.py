"""A whole server, `prism serve` with all its processes, started and stopped for a test."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from prism.agent.backoff import LONGEST_DELAY
from prism.demo.catalog import demo_model_path
from tests.support.waiting import PATIENCE, wait_until

DEMO = {name: demo_model_path(name) for name in ("adder", "speller", "radio")}
PLAIN: Any = {"trust_env": False, "verify": False}
"""For clients: reading certificates, which nobody needs here, took 20 ms of each look at a server."""
RUNNING: list[Server] = []
"""Servers that have not been closed: when a test fails, their logs are shown."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on.

    They are below those that the kernel gives to clients: one of them could have taken a port before the
    server does.
    """
    ports: set[int] = set()
    while len(ports) < count:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as free:
            ports.add(free.getsockname()[1])
    return list(ports)


class Server:
    """`prism serve` on free ports, with a run directory of its own. Use as a context manager.

    Leaving it stops the server and checks that it ended with status 0, left no process and no run
    directory, and logged no traceback. `sections` are those of the configuration; `model`
    is for all models. `longest_delay` bounds the wait for a process that is started again.
    """

    def __init__(
        self, models: dict[str, Path] = DEMO, *, longest_delay: float = LONGEST_DELAY, **sections: Any
    ) -> None:
        self._longest_delay = longest_delay
        self.home = Path(tempfile.mkdtemp(prefix="prism-test-"))  # short: it holds unix sockets
        self.port, self.admin_port = free_ports(2)
        self.url, self.admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._children: dict[int, psutil.Process] = {}
        device = {"memory": "64MiB", "slab": "2MiB", "threads": 1} | sections.pop("device", {})
        server = {"port": self.port, "admin_port": self.admin_port} | sections.pop("server", {})
        common = sections.pop("model", {})
        named = [{"name": name, "path": str(path)} | common for name, path in models.items()]
        devices = sections.pop("devices", [device])
        self.config = {"models": named, "devices": devices, "server": server, **sections}
        (self.home / "prism.yaml").write_text(json.dumps(self.config))
        RUNNING.append(self)

    # --- life and death -----------------------------------------------------------------------------

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.stop()
                assert self.leftovers() == [], "processes are left"
                assert self.run_dirs() == [], "a run directory is left"
                assert "Traceback" not in self.log, self.log
        finally:
            self.close()

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.spawn()
        wait_until(self.is_ready, f"the server serves\n{self.log}")

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start it."""
        delay = f"from prism.agent import backoff; backoff.LONGEST_DELAY = {self._longest_delay}"
        launcher = f"{delay}; from prism.cli.main import main; main()"
        command = [sys.executable, "-c", launcher, "serve", self.home / "prism.yaml"]
        environment = os.environ | {"XDG_RUNTIME_DIR": str(self.home)}
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        return self.process

    def is_ready(self) -> bool:
        """Requests are served, and the controller has heard of the worker."""
        assert self.process is not None and self.process.poll() is None, self.log
        self.children()
        try:
            with httpx.Client(**PLAIN, timeout=5) as client:  # who does not answer is asked again
                health = client.get(f"{self.url}/health")
                state = client.get(f"{self.admin}/admin/models")
        except httpx.HTTPError:
            return False
        return health.status_code == 200 and bool(state.json()["devices"])

    def stop(self) -> None:
        """SIGTERM; it must end well. Nothing happens to one that has ended."""
        assert self.process is not None
        self.children()
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log

    def kill(self, name: str) -> int:
        """Kill -9 the process of this name (`worker-0`, `controller`, `gateway-0`, ...), and tell its pid."""
        pid = self.pid(name)
        assert pid is not None, f"{name} does not run"
        os.kill(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        """Whatever has happened, nothing stays."""
        RUNNING.remove(self)
        if self.process is not None and self.process.poll() is None:
            self.children()
            self.process.kill()
            self.process.wait()
        for child in self._children.values():
            with suppress(psutil.NoSuchProcess):  # psutil knows a pid that was given to another process
                child.kill()
        shutil.rmtree(self.home)

    # --- what is there ------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """Everything logged so far."""
        path = self.home / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def children(self) -> dict[int, str]:
        """Live processes below the agent: pid and command line. All that were ever seen are remembered."""
        assert self.process is not None
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._children.setdefault(child.pid, child)
        return {pid: line for pid, child in self._children.items() if (line := _command_line(child))}

    def leftovers(self) -> list[str]:
        """Command lines of processes that were seen below the agent and still live."""
        return [line for child in self._children.values() if (line := _command_line(child))]

    def pid(self, name: str) -> int | None:
        """The live process of this name."""
        found = [pid for pid, line in self.children().items() if f" --name {name} " in f"{line} "]
        return found[0] if found else None

    def run_dirs(self) -> list[Path]:
        """Run directories of servers, live or dead."""
        return list(self.home.glob("prism-*"))

    async def models(self) -> dict[str, dict[str, Any]]:
        """What `prism ps` shows of each model; a model whose worker is away is missing."""
        async with httpx.AsyncClient(**PLAIN, timeout=PATIENCE) as client:
            answer = (await client.get(f"{self.admin}/admin/models")).raise_for_status().json()
        return {entry["model"]: entry["report"] for entry in answer["models"] if entry["report"]}

    async def num_requests(self) -> int:
        """Requests that the worker has, running and waiting."""
        reports = (await self.models()).values()
        return sum(report["num_running"] + report["num_waiting"] for report in reports)

    async def metrics(self) -> dict[str, float]:
        """All samples of /metrics by name and labels, summed over processes, models and the like: by name."""
        async with httpx.AsyncClient(**PLAIN, timeout=PATIENCE) as client:
            text = (await client.get(f"{self.url}/metrics")).raise_for_status().text
        samples = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in samples}


def _command_line(process: psutil.Process) -> str:
    """Empty once the process has ended, reaped or not."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return ""
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
