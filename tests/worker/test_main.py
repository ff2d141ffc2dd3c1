"""The worker's loop between its messages."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from prism import transport
from prism.config import Config
from prism.messages import CancelChoice
from prism.metrics import Metrics
from prism.worker import main
from prism.worker.gauges import Gauges
from prism.worker.main import LEAST_READING, Process, Sockets, ThreadJobs
from tests.support.local_worker import LocalWorker

NUM_MESSAGES = 20
MESSAGE_SECONDS = LEAST_READING / 4


class Clock:
    """Moved by messages, and by the test."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def on_cancel(self, *_: Any) -> None:
        self.seconds += MESSAGE_SECONDS


@pytest.fixture
def flooded(tmp_path: Path) -> Iterator[tuple[Process, Clock]]:
    """A worker to which a gateway has said a lot."""
    local = LocalWorker({"m": Path("nowhere")}, 8)
    sockets, jobs, clock = Sockets(tmp_path, "worker-0", 1), ThreadJobs(), Clock()
    process = Process(local.worker, sockets, jobs, Gauges(Metrics(), "worker-0"))
    process._clock = clock  # type: ignore[assignment]
    process._taken = 0.0
    local.worker.on_cancel = clock.on_cancel  # type: ignore[method-assign]
    gateway = transport.connect_dealer(sockets.router.context, sockets.address, "gateway-0.1")
    transport.send(gateway, CancelChoice(request_id="r", attempt=0))
    assert sockets.router.poll(10_000, zmq.POLLIN)
    process._take_events(0.0)
    for _ in range(100):  # many rounds without any message
        clock.seconds += MESSAGE_SECONDS / 10
        process._take_events(0.0)
    for _ in range(NUM_MESSAGES):
        transport.send(gateway, CancelChoice(request_id="r", attempt=0))
    time.sleep(0.3)  # until all of them are there
    yield process, clock
    gateway.close(linger=0)
    sockets.router.context.destroy(linger=0)
    os.close(jobs.wake)
    local.close()


def rounds(process: Process, clock: Clock, step_seconds: float) -> list[int]:
    """Messages that are read in each, until there are no more; a step is made in between."""
    read: list[int] = []
    while sum(read) < NUM_MESSAGES:
        assert process._sockets.router.poll(10_000, zmq.POLLIN), "messages are lost"
        before = clock.seconds
        process._take_events(0.0)
        read.append(round((clock.seconds - before) / MESSAGE_SECONDS))
        clock.seconds += step_seconds
    return read


def test_a_flood_of_messages_leaves_steps_their_turns(flooded: tuple[Process, Clock]) -> None:
    """A thousand requests that came at once were taken in before anybody's next token."""
    process, clock = flooded
    assert max(rounds(process, clock, 0.0)) <= 5


def test_where_steps_are_long_messages_have_as_long(flooded: tuple[Process, Clock]) -> None:
    """On a CPU a step holds the loop: a dozen requests were read for each of 0.2 s."""
    process, clock = flooded
    read = rounds(process, clock, 8 * MESSAGE_SECONDS)
    assert max(read) <= 5 + 8 and len(read) <= 1 + NUM_MESSAGES // 8


def test_a_package_that_a_device_lacks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback, three times."""

    def lacks(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    lines: list[str] = []
    monkeypatch.setattr(main.logs, "setup", lambda *_: None)
    monkeypatch.setattr(main, "Sockets", lambda *_: SimpleNamespace(to_agent=lambda _: None))
    monkeypatch.setattr(main, "open_device", lacks)
    monkeypatch.setattr(main.log, "error", lambda text, *values: lines.append(text % values))
    config = Config.model_validate({"models": [{"name": "m", "path": "nowhere"}]})
    assert main.run(tmp_path, "worker-0", 1, config) == 1
    assert lines == [
        "worker-0: No module named 'triton'; `prism doctor` says what is missing for devices like this"
    ]
