"""Kill -9, any process at any moment: clients get every token once, or hear that their gateway has gone."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Sequence

import httpx
import pytest

from tests.server import load
from tests.server.clients import Answer, Call, ends, golden_calls
from tests.server.harness import Server, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


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


async def run(client: httpx.AsyncClient, server: Server) -> list[Answer]:
    """The whole load, undisturbed."""
    return await ends([call.start(client, server.url) for call in load.calls()])


@pytest.fixture(scope="module")
def expected(server: Server) -> list[Answer]:
    """What an undisturbed run answers."""

    async def undisturbed() -> list[Answer]:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            return await run(client, server)

    answers = asyncio.run(undisturbed())
    for answer in answers:
        assert answer.is_done and answer.usage is not None, answer
        assert answer.usage["completion_tokens"] >= load.LEAST_TOKENS * len(answer.choices)
    finishes = [choice.finish for answer in answers for choice in answer.choices.values()]
    assert finishes.count("stop") == 3 and set(finishes) == {"stop", "length"}
    return answers


def num_events(calls: Sequence[Call]) -> int:
    return sum(call.answer.num_events for call in calls)


async def test_ten_workers_die_and_no_stream_notices(
    client: httpx.AsyncClient, server: Server, expected: list[Answer]
) -> None:
    """Three die while they start, five soon after the streams go on, two after a good deal of the work.

    Moments are shares of the work, not times: on a fast machine the streams ended before the tenth kill.
    """
    total = sum(answer.num_events for answer in expected)
    rng = random.Random(7)
    calls = [call.start(client, server.url) for call in load.calls()]
    for moment in ("soon", "start", "soon", "late", "soon", "start", "soon", "late", "start", "soon"):
        pid = await eventually(lambda: server.pid("worker-0"), "a worker runs")
        if moment == "start":
            await asyncio.sleep(rng.uniform(0, 2))
        else:
            share = rng.uniform(0, 0.03) if moment == "soon" else 0.15
            goal = num_events(calls) + total * share
            await eventually(lambda goal=goal: num_events(calls) > goal, "the streams go on", 60)
        assert not all(call.answer.is_done for call in calls), "the load is too small"
        assert server.kill("worker-0") == pid
        await eventually(lambda pid=pid: server.pid("worker-0") != pid, "it is dead")
    assert_alike(await ends(calls), expected)
    samples = await server.metrics()
    assert sum(value for name, value in samples.items() if "resubmissions_total" in name) > 20


async def test_a_gateway_dies_with_its_streams_and_its_successor_serves(
    client: httpx.AsyncClient, server: Server, expected: list[Answer]
) -> None:
    calls = [call.start(client, server.url) for call in load.calls()]
    await eventually(lambda: num_events(calls) > 300, "the streams are under way")
    await eventually(server.num_requests, "the controller has heard of them", 3)
    server.kill("gateway-0")
    late, right = golden_calls("adder", 1)[0]
    late.start(client, server.url)  # waits in the listening socket, which the agent keeps open
    await eventually(lambda: _is_idle(server), "the worker has dropped them", 2)
    answers = await ends(calls, 5)
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


async def test_everything_dies_with_the_agent(client: httpx.AsyncClient) -> None:
    with Server() as server:
        calls = [call.start(client, server.url) for call in load.calls()[:6]]
        await eventually(lambda: num_events(calls) > 100, "the streams are under way")
        (stale,) = server.run_dirs()
        assert len(server.children()) >= 3 and server.process is not None
        server.process.kill()
        await eventually(lambda: not server.leftovers(), "no process is left", 2)
        assert all(answer.is_broken for answer in await ends(calls, 5))
        for port in (server.port, server.admin_port):
            socket.create_server(("127.0.0.1", port)).close()
        assert stale.exists()
        server.process.wait()
        server.start()
        (fresh,) = server.run_dirs()
        assert fresh != stale and not stale.exists()
        call, text = golden_calls("radio", 1)[0]
        assert (await call.start(client, server.url).end()).text == text
