"""Starts one child process again and again until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prism.agent.backoff import Backoff
from prism.messages import Role

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""What has not become ready by then hangs. A GPU's worker takes 5 to 10."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start. `listen_fd` is a listening socket that the child inherits."""

    role: Role
    name: str
    listen_fd: int | None = None


class Child:
    """One process and its successors. Callbacks run on the agent's loop."""

    def __init__(
        self,
        spec: ChildSpec,
        run_dir: Path,
        on_end: Callable[[Child], None],
        on_hopeless: Callable[[Child], None],
    ) -> None:
        self.spec = spec
        self.incarnation = 0
        self.has_ended = True
        """The present incarnation has; what still comes from it is void."""
        self.address: str | None = None
        self.ready_since: float | None = None
        self._run_dir = run_dir
        self._on_end = on_end
        self._on_hopeless = on_hopeless
        self._backoff = Backoff()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def last_pid(self) -> int | None:
        """Process id of the present process or of the one that ended last."""
        return None if self._process is None else self._process.pid

    async def ended(self) -> None:
        """Wait until its process has ended and no other will follow."""
        await self._ended.wait()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def supervise(self) -> None:
        """Start, wait, start again; returns once `stop` was called and the process has ended."""
        try:
            while not self._stopping.is_set():
                self.incarnation += 1
                self.has_ended = False
                end = await self._live()
                self.has_ended = True
                lived = None if self.ready_since is None else self._now() - self.ready_since
                self.ready_since = self.address = None
                self._on_end(self)
                if not self._stopping.is_set():
                    await self._back_off(end, lived)
        finally:
            self._ended.set()

    async def _live(self) -> str:
        """One process from its start to its end; how it ended, in words."""
        try:
            process = await asyncio.create_subprocess_exec(*self._command(), pass_fds=self._fds())
        except OSError as error:
            return f"could not be started ({error.strerror})"
        self._process = process
        if self._stopping.is_set():  # too late for whoever told the others to end
            self.signal(signal.SIGTERM)
        end = asyncio.create_task(process.wait())
        await asyncio.wait({end}, timeout=START_SECONDS)
        if not end.done() and self.ready_since is None:
            log.error("%s has not become ready within %g s: it is killed", self.spec.name, START_SECONDS)
            self.signal(signal.SIGKILL)
        return f"ended with {describe(await end)}"

    async def _back_off(self, end: str, lived: float | None) -> None:
        delay = self._backoff.delay(lived)
        if self._backoff.never_starts:
            log.error("%s %s", self.spec.name, end)
            self.stop()
            self._on_hopeless(self)
            return
        log.error("%s %s, starting it again in %g s", self.spec.name, end, delay)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), delay)

    def became_ready(self, address: str | None) -> None:
        """The process has told that it does its work."""
        self.address = address
        self.ready_since = self._now()

    def stop(self) -> None:
        """Do not start it again."""
        self._stopping.set()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self.pid is not None and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _fds(self) -> tuple[int, ...]:
        return () if self.spec.listen_fd is None else (self.spec.listen_fd,)

    def _command(self) -> list[str]:
        spec = self.spec
        command = [sys.executable, "-m", "prism.agent.child", spec.role.value]
        command += ["--run-dir", str(self._run_dir), "--name", spec.name]
        command += ["--incarnation", str(self.incarnation), "--agent-pid", str(os.getpid())]
        return command if spec.listen_fd is None else [*command, "--listen-fd", str(spec.listen_fd)]


def describe(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"status {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
