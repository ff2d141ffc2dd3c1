"""Starting processes again and again, and ending them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from prism.agent import backoff, children
from prism.agent.children import Child, ChildSpec, describe
from prism.messages import Role
from tests.support.waiting import PATIENCE, eventually

pytestmark = pytest.mark.anyio

FOR_EVER = "import time\nwhile True: time.sleep(60)"


class Script(Child):
    """A child that runs any Python code, or another command."""

    def __init__(self, code: str, *, command: list[str] | None = None) -> None:
        spec = ChildSpec(Role.WORKER, "worker-0")
        super().__init__(spec, Path("/nowhere"), self._note_end, self._note_hopeless)
        self._line = command or [sys.executable, "-S", "-c", code]
        self.ends: list[int] = []
        self.is_hopeless = False
        self.wake = asyncio.Event()

    def _command(self) -> list[str]:
        return self._line

    def _note_end(self, child: Child) -> None:
        assert child is self and self.has_ended
        self.ends.append(self.incarnation)
        self.wake.set()

    def _note_hopeless(self, child: Child) -> None:
        self.is_hopeless = True

    async def until(self, num_ends: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.ends) < num_ends:
                self.wake.clear()
                await self.wake.wait()


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "FIRST_DELAY", 0.0)


async def running(child: Child) -> int:
    """Its process id, once it runs."""
    pid: int = await eventually(lambda: child.pid, "it runs", pause=0.001)
    return pid


async def ends(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(PATIENCE):
        await task


async def test_what_has_worked_is_started_again_until_it_is_stopped() -> None:
    child = Script(FOR_EVER)
    supervisor = asyncio.create_task(child.supervise())
    for number in range(1, 6):
        pid = await running(child)
        assert child.incarnation == number
        if number == 1:
            child.became_ready("somewhere")
            assert child.address == "somewhere" and child.ready_since is not None
        os.kill(pid, signal.SIGKILL)
        await child.until(number)
        assert child.address is None and child.ready_since is None
    await running(child)
    child.stop()
    child.signal(signal.SIGTERM)
    await ends(supervisor)
    assert child.ends == [1, 2, 3, 4, 5, 6] and not child.is_hopeless


async def test_what_never_becomes_ready_is_given_up() -> None:
    child = Script("raise SystemExit(3)")
    await ends(asyncio.create_task(child.supervise()))
    assert child.is_hopeless and child.ends == [1, 2, 3]


async def test_what_hangs_before_it_is_ready_is_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests waited for it in vain. One that was ready in time may take as long as it wants."""
    monkeypatch.setattr(children, "START_SECONDS", 0.2)
    child = Script(FOR_EVER)
    supervisor = asyncio.create_task(child.supervise())
    await running(child)
    child.became_ready("somewhere")
    await asyncio.sleep(0.5)
    assert child.incarnation == 1 and not caplog.text
    child.signal(signal.SIGKILL)
    await child.until(3)
    assert caplog.text.count("worker-0 has not become ready within 0.2 s: it is killed") >= 2
    child.stop()
    child.signal(signal.SIGKILL)
    await ends(supervisor)
    assert not child.is_hopeless


async def test_a_program_that_is_not_there_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Its supervisor ended with an exception that nobody saw."""
    child = Script("", command=["/no/such/program"])
    with caplog.at_level("ERROR", "prism"):
        await ends(asyncio.create_task(child.supervise()))
    assert child.is_hopeless and child.last_pid is None
    assert "could not be started (No such file or directory)" in caplog.text


async def test_its_end_is_awaited_and_it_is_not_started_again() -> None:
    child = Script(FOR_EVER)
    supervisor = asyncio.create_task(child.supervise())
    pid = await running(child)
    assert child.last_pid == pid and not child.has_ended
    child.stop()
    waiter = asyncio.create_task(child.ended())
    os.kill(pid, 0)
    assert not waiter.done()
    child.signal(signal.SIGKILL)
    await ends(waiter)
    await ends(supervisor)
    assert child.ends == [1]
    child.signal(signal.SIGKILL)  # to nobody


async def test_one_that_is_just_being_started_is_ended_too() -> None:
    """Who waited for its predecessor's end was told at once, and then waited for ever for this one's."""
    child = Script(FOR_EVER)
    supervisor = asyncio.create_task(child.supervise())
    await asyncio.sleep(0)  # it is being started
    assert child.incarnation == 1 and child.pid is None
    child.stop()
    async with asyncio.timeout(PATIENCE):
        await child.ended()
    await ends(supervisor)
    assert child.ends == [1]


async def test_stopped_before_it_was_started() -> None:
    child = Script(FOR_EVER)
    child.stop()
    await ends(asyncio.create_task(child.supervise()))
    await child.ended()
    assert child.incarnation == 0


def test_ends_in_words() -> None:
    assert describe(0) == "status 0"
    assert describe(-9) == "signal SIGKILL"
    assert describe(-77) == "signal 77"
