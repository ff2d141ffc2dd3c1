"""Turns of the worker's loop that take long, and which part of them did."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from prism.memory.driver import MemoryInfo
from prism.metrics import Metrics
from prism.types import Bytes, GiB, MiB
from prism.worker import housekeeping
from prism.worker.gauges import Gauges
from prism.worker.main import Process, Sockets, ThreadJobs
from prism.worker.turn_watch import TurnWatch
from tests.support.local_worker import LocalWorker

PARTS = ("messages", "commits", "models and KV that move", "admission", "steps", "the rest")


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float, then: Callable[..., Any] = lambda: None) -> Callable[..., Any]:
        """The same call, which takes so long."""

        def call(*args: Any, **options: Any) -> Any:
            self.now += seconds
            return then(*args, **options)

        return call


class Turns:
    """A worker's process whose loop makes some turns, by a clock that the test moves."""

    def __init__(self, local: LocalWorker, folder: Path, *, computes_steps: bool) -> None:
        self.time, self.worker = Time(), local.worker
        watch = self.worker.watch = TurnWatch("w", computes_steps=computes_steps, clock=self.time)
        self.stalls = watch.stalls
        self.metrics = Metrics()
        self.jobs = ThreadJobs()
        self.sockets = Sockets(folder, "worker-0", 1)
        self.process = Process(self.worker, self.sockets, self.jobs, Gauges(self.metrics, "worker-0"))
        self.idle_seconds = 0.0
        poller = SimpleNamespace(
            poll=lambda milliseconds: self.time.passes(
                self.idle_seconds if milliseconds else 0.0, lambda: [(self.jobs.wake, zmq.POLLIN)]
            )()
        )
        self.replace(self.process, "_poller", lambda _: poller)
        self.replace(self.worker._stepper, "step", lambda _: self._step)

    def replace(self, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
        setattr(owner, name, change(getattr(owner, name)))

    def takes(self, part: str, seconds: float) -> None:
        """Let this part of a turn take so long."""
        owner, name = {
            "messages": (self.jobs, "finished"),
            "commits": (self.worker._stepper, "collect"),
            "models and KV that move": (self.worker._arrivals, "look"),
            "admission": (self.worker, "_admit"),
            "steps": (self.worker._stepper, "step"),
            "the rest": (self.worker.device.backend, "work_aside"),
        }[part]
        self.replace(owner, name, lambda before: self.time.passes(seconds, before))

    def close(self) -> None:
        self.sockets.router.context.destroy(linger=0)
        os.close(self.jobs.wake)

    def run(self, num_turns: int, *, has_more: bool = True) -> None:
        """With `has_more` to do after each the loop does not wait."""
        self.is_last = iter(number == num_turns for number in range(1, num_turns + 1))
        self.has_more = has_more
        self.process.run()

    def _step(self, _now: float) -> bool:
        if next(self.is_last):
            self.process.stop()
        return self.has_more


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Turns]]:
    local = LocalWorker({"m": Path("nowhere")}, 8)
    started: list[Turns] = []

    def make(*, computes_steps: bool = False) -> Turns:
        started.append(Turns(local, tmp_path, computes_steps=computes_steps))
        return started[-1]

    yield make
    for turns in started:
        turns.close()
    local.close()


@pytest.mark.parametrize("part", PARTS)
def test_a_long_turn_is_counted_and_its_longest_part_told(
    part: str, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    turns = start()
    for other in PARTS:
        turns.takes(other, 0.5 if other == part else 0.0625)
    turns.run(1)
    assert (turns.stalls.num_stalls, turns.stalls.seconds) == (1, 0.8125)
    with caplog.at_level(logging.WARNING):
        turns.process._report_due = 0.0
        turns.process._report()
    assert f"w stood still for up to 0.81 s (0.50 s in one part of a turn, {part};" in caplog.text
    text = turns.metrics.text().decode()
    assert 'prism:loop_stalls_total{process="worker-0"} 1.0' in text
    assert 'prism:loop_stall_seconds_total{process="worker-0"} 0.8125' in text


def test_a_long_turn_in_which_a_report_is_due_is_told_with_its_own_core_time(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nearly all are: reports come every half second. It was told how the loop had fared since."""
    turns = start()
    turns.stalls._core_time = lambda: turns.time.now / 4
    turns.process._report()
    turns.takes("commits", 1.0)
    turns.process._report_due = 0.0
    with caplog.at_level(logging.WARNING):
        turns.run(1)
    assert "its loop had a core for 0.25 of the last 1.00 s" in caplog.text


def test_many_short_turns_are_none(start: Any) -> None:
    turns = start()
    turns.takes("commits", 0.125)
    turns.run(4)
    assert turns.time.now == 100.5
    assert turns.stalls.num_stalls == 0


def test_waiting_for_messages_is_none(start: Any) -> None:
    turns = start()
    turns.idle_seconds = 0.375
    turns.run(3, has_more=False)
    assert turns.time.now == 100.75
    assert turns.stalls.num_stalls == 0


def test_waking_late_is_one(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A worker that was stopped, or got no core, for six seconds while it was idle said nothing."""
    turns = start()
    turns.idle_seconds = 6.5
    turns.run(2, has_more=False)
    assert turns.stalls.num_stalls == 1
    assert turns.stalls.seconds == pytest.approx(6.0, abs=0.4)
    with caplog.at_level(logging.WARNING):
        turns.process._worker.watch.tell()
    assert "it woke so late from a wait" in caplog.text


def test_a_cpu_computes_in_its_loop(start: Any) -> None:
    turns = start(computes_steps=True)
    turns.takes("steps", 4.0)
    turns.takes("admission", 0.125)
    turns.run(2)
    assert turns.stalls.num_stalls == 0
    turns.takes("admission", 0.25)
    turns.process._is_stopping = False
    turns.run(1)
    assert (turns.stalls.num_stalls, turns.stalls.seconds) == (1, 0.375)


@pytest.mark.parametrize(
    ("has_more", "num_waiting", "told"), [(True, 0, "busy"), (False, 1, "busy"), (False, 0, "idle")]
)
def test_housekeeping_is_told_whether_there_is_time_for_it(
    has_more: bool, num_waiting: int, told: str, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, looks = start(), list[str]()
    keeping = SimpleNamespace(busy=lambda: looks.append("busy"), idle=lambda: looks.append("idle"))
    turns.process._housekeeping = keeping
    monkeypatch.setattr(type(turns.worker.requests), "__len__", lambda _: num_waiting)
    turns.run(3, has_more=has_more)
    assert looks == 3 * [told]


def test_memory_that_nobody_counts_is_a_metric(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = start()
    device = turns.worker.device
    used = device.pool.physical_bytes + 5 * MiB
    monkeypatch.setattr(device.driver, "memory_info", lambda: MemoryInfo(Bytes(GiB - used), GiB))
    monkeypatch.setattr(housekeeping, "QUIET_SECONDS", 0.0)
    turns.run(1, has_more=False)
    assert f'prism:unaccounted_bytes{{worker="worker-0"}} {float(5 * MiB)!r}' in _numbers(turns)


def _numbers(turns: Turns) -> str:
    """Metrics, with numbers as Python writes them."""
    lines = (line.rpartition(" ") for line in turns.metrics.text().decode().splitlines() if line[0] != "#")
    return "\n".join(f"{name} {float(value)!r}" for name, _, value in lines)
