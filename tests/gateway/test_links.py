"""Messages of a busy worker leave others a turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import zmq.asyncio

from prism.gateway import links
from prism.gateway.links import ProcessLinks
from prism.messages import Outputs, ProcessUp, Role
from tests.gateway.processes import Peer
from tests.support.waiting import eventually

pytestmark = pytest.mark.anyio
NUM_MESSAGES = 50


class Heard:
    """Counts, at each message of a worker, the turns that another task has had by then."""

    def __init__(self) -> None:
        self.turns = 0
        self.seen: list[int] = []

    def on_worker_up(self, placement: Any) -> None:
        pass

    def on_worker_message(self, placement: Any, message: Any) -> None:
        self.seen.append(self.turns)

    async def take_turns(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)


async def turns_between(run_dir: Path) -> int:
    """That another task had from the first of many messages, all of which are there, to the last."""
    context = zmq.asyncio.Context()
    agent, worker = Peer(context, run_dir, "agent"), Peer(context, run_dir, "w0.1")
    heard, under_test = Heard(), ProcessLinks("g0", 1, agent.address)
    under_test.listener = heard  # type: ignore[assignment]
    running = asyncio.create_task(under_test.run(lambda _: None))
    other = asyncio.create_task(heard.take_turns())
    try:
        await eventually(lambda: agent.sender, "the gateway has said hello")
        agent.say(ProcessUp(role=Role.WORKER, name="w0", incarnation=1, address=worker.address))
        await eventually(lambda: worker.sender, "it has found the worker")
        for _ in range(NUM_MESSAGES):
            worker.say(Outputs(incarnation=1, items=[], tokens=[]))
        await eventually(lambda: len(heard.seen) == NUM_MESSAGES, "all has been read")
    finally:
        for task in (running, other):
            task.cancel()
        await asyncio.gather(running, other, return_exceptions=True)
        under_test.close()
        agent.close()
        worker.close()
        context.term()
    return heard.seen[-1] - heard.seen[0]


async def test_others_have_turns_while_messages_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MOST_READING", 0.0)
    assert await turns_between(tmp_path) >= NUM_MESSAGES - 1


async def test_what_is_there_is_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MOST_READING", 60.0)
    assert await turns_between(tmp_path) < NUM_MESSAGES / 2
