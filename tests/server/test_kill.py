"""Kill -9, any process at any moment: clients get every token once, or hear that their gateway has gone."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.server import load
from tests.server.clients import Answer, Call, ends, golden_calls
from tests.server.harness import Server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

SOON = 20.0
"""Seconds. Two are promised, and hold unless the machine is overloaded; more is a timeout."""


def assert_alike(answers: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same texts, finish reasons, usage and log-probabilities; nothing twice, nothing missing."""
    for number, (answer, other) in enumerate(zip(answers, expected, strict=True)):
        assert answer.is_done and answer.error is None, (number, answer)
        assert answer.usage == other.usage, number
        assert answer.choices.keys() == other.choices.keys(), number
        for index, choice in answer.choices.items():
            reference = other.choices[index]
            assert choice.text == reference.text, (number, index)
            assert choice.finish == reference.finish, (number, index)
            assert choice.tokens == reference.tokens, (number, index)
            assert choice.num_top == reference.num_top, (number, index)
            assert choice.logprobs == pytest.approx(reference.logprobs, abs=1e-3), (number, index)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Processes that keep dying start again soon."""
    with Server(longest_delay=0.5) as server:
        yield server


@pytest.fixture
async def expected(client: httpx.AsyncClient, server: Server) -> list[Answer]:
    return await load.undisturbed(client, server)


def num_events(calls: Sequence[Call]) -> int:
    return sum(call.answer.num_events for call in calls)


class Killer:
    """Kills workers at shares of the work and of a start-up, which last as long as the machine lets them."""

    def __init__(self, server: Server, calls: Sequence[Call], total: int) -> None:
        self._server, self._calls, self._total = server, calls, total
        self._startup = 0.0
        """From the last worker's first sign to the first event behind it."""

    async def while_it_starts(self, share: float) -> None:
        """The next worker, so far into its start-up."""
        pid = await self._next()
        await asyncio.sleep(share * self._startup)
        await self._kill(pid)

    async def while_it_works(self, share: float) -> None:
        """The next worker, once it has done this share of all the work."""
        pid = await self._next()
        begin, before = time.monotonic(), num_events(self._calls)
        await eventually(lambda: num_events(self._calls) > before, "the streams go on")
        self._startup = time.monotonic() - begin
        goal = before + self._total * share
        await eventually(lambda: num_events(self._calls) > goal, "the streams go on")
        await self._kill(pid)

    async def _next(self) -> int:
        pid: int = await eventually(lambda: self._server.pid("worker-0"), "a worker runs")
        return pid

    async def _kill(self, pid: int) -> None:
        assert not all(call.answer.is_done for call in self._calls), "the load is too small"
        assert self._server.kill("worker-0") == pid
        await eventually(lambda: self._server.pid("worker-0") != pid, "it is dead")


async def test_ten_workers_die_and_no_stream_notices(
    client: httpx.AsyncClient, server: Server, expected: list[Answer]
) -> None:
    """Three die while they start, five soon after the streams go on, two after a good deal of the work.

    Moments are shares of the work, not times: on a fast machine the streams ended before the tenth kill.
    With the agent's whole back-off it takes a minute, in which nothing comes for those that do not stream:
    their client gave up after 60 s, in more than every other run.
    """
    rng = random.Random(7)
    calls = [call.start(client, server.url) for call in load.calls()]
    killer = Killer(server, calls, sum(answer.num_events for answer in expected))
    for moment in ("soon", "soon", "start", "late", "soon", "start", "soon", "late", "start", "soon"):
        if moment == "start":
            await killer.while_it_starts(rng.uniform(0, 1))
        else:
            await killer.while_it_works(rng.uniform(0, 0.03) if moment == "soon" else 0.15)
    assert_alike(await ends(calls), expected)
    samples = await server.metrics()
    assert sum(value for name, value in samples.items() if "resubmissions_total" in name) > 20


async def test_a_gateway_dies_with_its_streams_and_its_successor_serves(
    client: httpx.AsyncClient, server: Server, expected: list[Answer]
) -> None:
    before = await num_decoded(server)
    calls = [call.start(client, server.url) for call in load.calls()]
    await eventually(lambda: num_events(calls) > 300, "the streams are under way")
    await eventually(server.num_requests, "the controller has heard of them")
    server.kill("gateway-0")
    late, right = golden_calls("adder", 1)[0]
    late.start(client, server.url)  # waits in the listening socket, which the agent keeps open
    await eventually(lambda: _is_idle(server), "the worker has dropped them", SOON)
    decoded = await num_decoded(server) - before
    assert decoded < sum(other.usage["completion_tokens"] for other in expected if other.usage) / 2
    answers = await ends(calls)
    assert sum(answer.is_broken for answer in answers) >= 15  # the others had ended before
    for answer, other in zip(answers, expected, strict=True):
        assert answer.is_broken is not answer.is_done and answer.error is None
        for index, choice in answer.choices.items():
            assert other.choices[index].text.startswith(choice.text)
    assert (await late.end()).text == right
    for call, text in golden_calls("speller", 5):
        assert (await call.start(client, server.url).end()).text == text


async def _is_idle(server: Server) -> bool:
    return await server.num_requests() == 0


async def num_decoded(server: Server) -> int:
    """Tokens of the present worker, as far as the controller has heard."""
    return sum(report["decoded_tokens"] for report in (await server.models()).values())


async def test_no_stream_notices_that_controllers_die(
    client: httpx.AsyncClient, server: Server, expected: list[Answer]
) -> None:
    rng = random.Random(8)
    calls = [call.start(client, server.url) for call in load.calls()]
    for _ in range(2):
        before = num_events(calls)
        await eventually(lambda before=before: num_events(calls) > before, "the streams go on")
        await asyncio.sleep(rng.uniform(0, 0.5))
        pid = server.kill("controller")
        await eventually(lambda pid=pid: server.pid("controller") not in (None, pid), "another one starts")
    assert not any(call.answer.is_broken for call in calls)
    assert_alike(await ends(calls), expected)
    await eventually(lambda: _answers(server), "admin works again")
    answer = await client.post(f"{server.admin}/admin/models/adder/load", json={"pinned": False})
    assert answer.status_code == 200, answer.text
    assert (await server.models())["adder"]["state"] == "active"


async def _answers(server: Server) -> bool:
    try:
        return bool(await server.models())
    except httpx.HTTPError:
        return False


async def test_what_was_unloaded_stays_away_when_its_worker_dies(
    client: httpx.AsyncClient, server: Server
) -> None:
    """It came back with the others, into free memory. One request brings it in."""

    async def states() -> dict[str, str]:
        return {name: report["state"] for name, report in (await server.models()).items()}

    async def are(**expected: str) -> bool:
        return await states() == expected

    await eventually(lambda: are(adder="active", speller="active", radio="active"), "all have come")
    answer = await client.post(f"{server.admin}/admin/models/speller/unload")
    assert answer.status_code == 200, answer.text
    await eventually(lambda: are(adder="active", speller="cold", radio="active"), "one has gone")
    pid = server.kill("worker-0")
    await eventually(lambda: server.pid("worker-0") not in (None, pid), "another one starts")
    await eventually(lambda: are(adder="active", speller="cold", radio="active"), "the others come back")
    await asyncio.sleep(1)  # in which it would come, too
    assert await are(adder="active", speller="cold", radio="active")
    await client.post(f"{server.url}/v1/completions", json={"model": "speller", "prompt": "a"})
    await eventually(lambda: are(adder="active", speller="active", radio="active"), "it is back")


async def test_a_worker_that_hangs_is_killed_and_no_stream_notices(
    client: httpx.AsyncClient, expected: list[Answer]
) -> None:
    """A process that is stopped stands for one whose GPU answers no more. They waited for it to the end."""
    with Server(longest_delay=0.5, device={"watchdog_timeout": "10s"}) as server:
        calls = [call.start(client, server.url) for call in load.calls()]
        await eventually(lambda: num_events(calls) > 300, "the streams are under way")
        pid = server.pid("worker-0")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: server.pid("worker-0") not in (None, pid), "another one starts")
        assert_alike(await ends(calls), expected)
        assert re.search(r"worker-0 has not reported for \d+ s: it is killed", server.log)


def memory_files(pids: Iterable[int]) -> set[int]:
    """Inodes of the memory files that these processes have open."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has ended, or is not ours
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                if os.readlink(descriptor).startswith("/memfd:"):
                    found.add(descriptor.stat().st_ino)
    return found


async def test_everything_dies_with_the_agent(client: httpx.AsyncClient) -> None:
    with Server() as server:
        calls = [call.start(client, server.url) for call in load.calls()[:6]]
        await eventually(lambda: num_events(calls) > 100, "the streams are under way")
        (stale,) = server.run_dirs()
        assert len(server.children()) >= 3 and server.process is not None
        held = memory_files((server.process.pid, *server.children()))
        assert len(held) >= 3, "the pool and packed weights"
        server.process.kill()
        await eventually(lambda: not server.leftovers(), "no process is left", SOON)
        # one that ends has no command line any more some time before it closes its files
        await eventually(lambda: not held & memory_files(psutil.pids()), "the memory is given back")
        assert all(answer.is_broken for answer in await ends(calls))
        for port in (server.port, server.admin_port):
            socket.create_server(("127.0.0.1", port)).close()
        assert stale.exists()
        server.process.wait()
        server.start()
        (fresh,) = server.run_dirs()
        assert fresh != stale and not stale.exists()
        call, text = golden_calls("radio", 1)[0]
        assert (await call.start(client, server.url).end()).text == text
