"""SIGTERM lets running streams end; a port that is taken is said by name."""

from __future__ import annotations

import os
import random
import signal
import socket
import time

import httpx
import openai
import pytest

from tests.server.clients import CHAT, Call, ends, golden_answers, golden_calls
from tests.server.harness import Server
from tests.support.waiting import PATIENCE, eventually, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

PATIENT = {"shutdown_grace": "10m"}
"""Longer than the tests wait for an end, which may therefore not be the grace's."""
ENDLESS = {"model": "radio", "stream": True, "ignore_eos": True, "max_tokens": 1500}


def endless(count: int) -> list[Call]:
    """Answers of several seconds."""
    return [
        Call(CHAT, {**ENDLESS, "messages": list(golden.messages), "seed": 1, "n": 4})
        for golden in golden_answers("radio")[:count]
    ]


async def refused(client: httpx.AsyncClient, server: Server) -> bool:
    """A new request is not taken."""
    try:
        response = await client.post(server.url + CHAT, json={"model": "adder", "messages": []})
    except httpx.ConnectError:
        return True
    if response.status_code == 503:
        assert response.json()["error"]["message"] == "the server is shutting down"
        assert int(response.headers["retry-after"]) > 0
        return True
    assert response.status_code == 400
    return False


async def test_streams_that_run_end_before_the_server(client: httpx.AsyncClient) -> None:
    with Server(server=PATIENT) as server:
        assert server.process is not None
        calls = golden_calls("radio", 12)
        for call, _ in calls:
            call.start(client, server.url)
        await eventually(lambda: all(call.answer.num_events > 5 for call, _ in calls), "they are under way")
        server.process.terminate()
        await eventually(lambda: refused(client, server), "new requests are refused")
        assert any(not call.answer.is_done for call, _ in calls)
        answers = await ends([call for call, _ in calls])
        assert [answer.text for answer in answers] == [text for _, text in calls]
        assert all(answer.is_done for answer in answers)
        assert server.process.wait(PATIENCE) == 0
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{server.url}/health")


async def test_streams_that_outlast_the_grace_end_with_an_error(client: httpx.AsyncClient) -> None:
    with Server(server={"shutdown_grace": "300ms"}) as server:
        assert server.process is not None
        calls = [call.start(client, server.url) for call in endless(5)]
        await eventually(lambda: all(call.answer.num_events > 5 for call in calls), "they are under way")
        server.process.terminate()
        for answer in await ends(calls):
            assert answer.error is not None and "shutting down" in answer.error["message"]
            assert answer.error["type"] == "server_error"
            assert not answer.is_done and not answer.is_broken
        assert server.process.wait(PATIENCE) == 0


def ask_all(clients: list[openai.OpenAI]) -> None:
    golden = golden_answers("adder")[0]
    for client in clients:
        answer = client.chat.completions.create(model="adder", messages=list(golden.messages))  # type: ignore[arg-type]
        assert answer.choices[0].message.content == golden.answer


def test_a_starting_gateway_does_not_hold_up_the_end() -> None:
    """It was never told to stop, so that the end took the whole grace."""
    with Server(server=PATIENT) as server:
        server.kill("gateway-0")
        wait_until(lambda: server.pid("gateway-0"), "its successor starts")
        server.stop()


async def test_ctrl_c_reaches_all_processes_and_the_agent_decides(client: httpx.AsyncClient) -> None:
    """The controller took it for itself and left before the streams had ended.

    Connections that clients keep open, some of them to a gateway that is gone, delay nothing.
    """
    with Server(server=PATIENT) as server:
        assert server.process is not None
        clients = [openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") for _ in range(3)]
        ask_all(clients)
        server.kill("gateway-0")
        ask_all(clients)
        call, text = golden_calls("radio", 1)[0]
        call.start(client, server.url)
        await eventually(lambda: call.answer.num_events > 5, "it is under way")
        for pid in (*server.children(), server.process.pid):
            os.kill(pid, signal.SIGINT)
        assert (await call.end()).text == text
        assert server.process.wait(PATIENCE) == 0
        assert "controller ended" not in server.log
        for each in clients:
            each.close()


def test_it_can_be_stopped_while_it_starts() -> None:
    rng = random.Random(3)
    server = Server(server=PATIENT)
    try:
        for _ in range(4):
            process = server.spawn()
            wait_until(lambda: len(server.children()) >= 3, "its processes start")
            time.sleep(rng.uniform(0, 2))
            process.terminate()
            assert process.wait(PATIENCE) == 0
            assert not server.leftovers() and not server.run_dirs()
        assert "Traceback" not in server.log
    finally:
        server.close()


@pytest.mark.parametrize("field", ["port", "admin_port"])
def test_a_port_in_use_is_named(field: str) -> None:
    server = Server()
    try:
        with socket.create_server(("127.0.0.1", getattr(server, field))):
            assert server.spawn().wait(PATIENCE) == 2
        assert f"error: server.{field}: cannot listen on 127.0.0.1:{getattr(server, field)}" in server.log
        assert "Traceback" not in server.log
        assert not server.run_dirs() and not server.leftovers()
    finally:
        server.close()
