"""Messages of a busy worker are read together, and leave others a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from prism.gateway import links
from prism.gateway.links import MOST_READING, ProcessLinks
from prism.messages import Outputs
from prism.transport import Envelope
from tests.support.turns import OtherTask

pytestmark = pytest.mark.anyio

READING = MOST_READING / 4
"""What each message takes."""


class Worker:
    """Says so many messages at a time, with pauses in between; another task takes turns meanwhile."""

    def __init__(self, *bursts: int) -> None:
        self.now = 100.0
        self.others = OtherTask()
        self.seen: list[int] = []
        """At each message, the turns that the other task has had by then."""
        self._bursts = bursts

    async def messages(self, _socket: Any) -> AsyncIterator[Envelope]:
        for number in self._bursts:
            self.now += 1.0
            await asyncio.sleep(0)
            for _ in range(number):
                yield Envelope("", Outputs(incarnation=1, items=[], tokens=[]))

    def on_worker_message(self, _placement: Any, _message: Any) -> None:
        self.now += READING
        self.seen.append(self.others.turns)


async def read(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Turns that others had between one message and the next."""
    monkeypatch.setattr(links, "areceive", worker.messages)
    monkeypatch.setattr(links, "monotonic", lambda: worker.now)
    under_test: Any = object.__new__(ProcessLinks)
    under_test.listener = worker
    async with worker.others:
        await asyncio.wait_for(under_test._read_worker(None, None), 10)
    return [after - before for before, after in zip(worker.seen, worker.seen[1:], strict=False)]


async def test_others_have_a_turn_every_few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    between = await read(Worker(12), monkeypatch)
    assert between == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


async def test_what_comes_after_a_pause_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause counted as reading: the first message went out alone."""
    between = await read(Worker(3, 3, 3), monkeypatch)
    assert between == [0, 0, 1, 0, 0, 1, 0, 0]
