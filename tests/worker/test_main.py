"""The worker's loop between its messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import zmq

from prism import transport
from prism.messages import CancelChoice
from prism.metrics import Metrics
from prism.worker.gauges import Gauges
from prism.worker.main import MOST_READING, Process, Sockets, ThreadJobs
from tests.support.local_worker import LocalWorker

NUM_MESSAGES = 20


class Clock:
    """Each message takes a quarter of the time that may go by without a step."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def on_cancel(self, *_: Any) -> None:
        self.seconds += MOST_READING / 4


def test_a_flood_of_messages_leaves_steps_their_turns(tmp_path: Path) -> None:
    """A thousand requests that came at once were taken in before anybody's next token."""
    local = LocalWorker({"m": Path("nowhere")}, 8)
    sockets, jobs, clock = Sockets(tmp_path, "worker-0", 1), ThreadJobs(), Clock()
    process = Process(local.worker, sockets, jobs, Gauges(Metrics(), "worker-0"))
    process._clock = clock  # type: ignore[assignment]
    local.worker.on_cancel = clock.on_cancel  # type: ignore[method-assign]
    gateway = transport.connect_dealer(sockets.router.context, sockets.address, "gateway-0.1")
    for _ in range(NUM_MESSAGES):
        transport.send(gateway, CancelChoice(request_id="r", attempt=0))
    rounds = []
    while sum(rounds) < NUM_MESSAGES:
        assert sockets.router.poll(10_000, zmq.POLLIN), "messages are lost"
        before = clock.seconds
        process._take_events(0.0)
        rounds.append(round((clock.seconds - before) / (MOST_READING / 4)))
    assert max(rounds) <= 5 and sum(rounds) == NUM_MESSAGES
    gateway.close(linger=0)
    sockets.router.context.destroy(linger=0)
    os.close(jobs.wake)
    local.close()
