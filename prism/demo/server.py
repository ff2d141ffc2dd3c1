"""The demo's server: `prism serve` as a child process."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path
from types import TracebackType

import httpx

START_SECONDS = 90.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.1
_COMMAND = """
import ctypes, signal
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop when the demo is killed
from prism.cli.main import main
main()
"""


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class DemoServer:
    """Runs while the block runs; afterwards `status` is its exit status."""

    def __init__(self, config: Path, log: Path, port: int, admin_port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self.log = log
        self.status: int | None = None
        self._config = config
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> DemoServer:
        with self.log.open("wb") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _COMMAND, "serve", str(self._config)),
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is the demo's, which then stops the server
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        try:
            self.status = await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            self.status = await process.wait()

    async def ended(self) -> None:
        """Return when the server has ended by itself."""
        assert self._process is not None
        await self._process.wait()

    async def until_healthy(self) -> None:
        """Return once requests can be served and the worker has reported. Raises `DemoError`."""
        assert self._process is not None
        try:
            async with (
                asyncio.timeout(START_SECONDS),
                httpx.AsyncClient(trust_env=False, timeout=1) as client,
            ):
                while not await self._is_healthy(client):
                    if self._process.returncode is not None:
                        raise DemoError(f"the server ended with status {self._process.returncode}")
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise DemoError(f"the server was not healthy within {START_SECONDS:g} s") from None

    async def _is_healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            health = await client.get(f"{self.url}/health")
            answer = await client.get(f"{self.admin_url}/admin/models")
        except httpx.TransportError:
            return False
        return health.status_code == 200 and bool(answer.json()["devices"])

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines that the server has written."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])
