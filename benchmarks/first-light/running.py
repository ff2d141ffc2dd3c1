"""A server for the time of a measurement."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

LOOK_SECONDS = 0.02


class Server:
    """One that runs."""

    def __init__(self, process: subprocess.Popen[bytes], begin: float) -> None:
        self._process = process
        self._begin = begin

    def wait_for(self, is_done: Callable[[], bool], seconds: float) -> float:
        """Until it is, at most so long; seconds since the start. HTTP errors mean that it is not."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self._process.poll() is None:
            try:
                if is_done():
                    return time.perf_counter() - self._begin
            except httpx.HTTPError:
                pass
            time.sleep(LOOK_SECONDS)
        raise SystemExit("the server does not get that far")


@contextmanager
def running(config: Path, log: Path) -> Iterator[Server]:
    """`prism serve`, stopped at the end. If anything fails the end of its log is printed."""
    command = [sys.executable, "-c", "from prism.cli.main import main; main()", "serve", str(config)]
    begin = time.perf_counter()
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr)
    try:
        yield Server(process, begin)
    except BaseException:
        print(log.read_text()[-6000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def gpu_name() -> str | None:
    """Of this machine's first GPU, by its driver."""
    try:
        names = subprocess.check_output(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return names.splitlines()[0]


def is_healthy(port: int) -> bool:
    """It takes requests."""
    return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
