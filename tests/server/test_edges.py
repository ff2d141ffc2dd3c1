"""What surrounds the answers: keys, metrics, request ids, and several gateways behind one port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import cycle

import httpx
import openai
import psutil
import pytest

from prism.demo.catalog import golden_answers
from tests.server.clients import CHAT, PATIENCE, TEXT, Call, ends, golden_call, golden_calls
from tests.server.harness import DEMO, PLAIN, Server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

GATEWAYS = ("gateway-0", "gateway-1")
KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two gateways, guarded by keys; the log is for machines."""
    with Server(server={"gateways": 2, "api_keys": ["secret", "other"], "log_json": True}) as server:
        yield server


async def test_keys(client: httpx.AsyncClient, server: Server) -> None:
    call, text = golden_calls("adder", 1)[0]
    for given in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic secret"}):
        for response in (
            await client.post(server.url + CHAT, json=call.body, headers=given),
            await client.post(server.url + TEXT, json={}, headers=given),
            await client.get(f"{server.url}/v1/models", headers=given),
        ):
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("secret", "other"):
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key) as official:
            messages = call.body["messages"]
            answer = await official.chat.completions.create(model="adder", messages=messages)
            assert answer.choices[0].message.content == text
            assert {model.id async for model in official.models.list()} == set(DEMO)
    assert (await client.get(f"{server.url}/health")).status_code == 200


async def test_metrics_tell_what_goes_on(client: httpx.AsyncClient, server: Server) -> None:
    def of(name: str, model: str = "radio", **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in ({"model_name": model} | labels).items()]
        found = [
            value
            for sample, value in samples.items()
            if sample.startswith(f"prism:{name}{{") and all(each in sample for each in wanted)
        ]
        return sum(found)

    samples = await server.metrics()
    tokens, ttfts = of("generation_tokens_total"), of("time_to_first_token_seconds_count")
    successes = of("request_success_total", finished_reason="stop")
    questions = golden_calls("radio", 8)
    for _ in range(2):
        answers = await ends([call.start(client, server.url, **KEY) for call, _ in questions])
        assert [answer.text for answer in answers] == [text for _, text in questions]
        questions = golden_calls("radio", 8)
    body = {"ignore_eos": True, "max_tokens": 1500}
    calls = [
        golden_call("radio", golden, **body).start(client, server.url, **KEY)
        for golden in golden_answers("radio")[:3]
    ]
    await eventually(lambda: all(call.answer.num_events > 5 for call in calls), "they are under way")

    async def running() -> bool:
        samples.clear()
        samples.update(await server.metrics())
        return of("num_requests_running") == 3

    await eventually(running, "three run")
    assert 0 < of("kv_cache_usage_perc") <= 1
    loops = {f'prism:loop_stalls_total{{process="{name}"}}' for name in ("gateway-0", "worker-0")}
    assert loops <= set(samples)
    assert sum(value for name, value in samples.items() if name.startswith("prism:slabs{")) == 32
    slabs = {
        owner: sum(v for n, v in samples.items() if n.startswith("prism:slabs{") and f'owner="{owner}"' in n)
        for owner in ("weights", "kv", "free")
    }
    assert all(count > 0 for count in slabs.values()), slabs
    assert of("time_to_first_token_seconds_count") - ttfts == 16 + 3
    assert of("request_success_total", finished_reason="stop") - successes == 16
    assert of("generation_tokens_total") - tokens > 16 * 100
    assert of("prefix_cache_hits_total") > 0.3 * 8 * 50
    assert of("prefix_cache_queries_total") > of("prefix_cache_hits_total")
    assert of("activations_total") >= 1 and of("activation_seconds_sum") > 0
    assert of("e2e_request_latency_seconds_count") >= 16
    assert of("inter_token_latency_seconds_count") > 16 * 100
    for call in calls:
        assert call.task is not None
        call.task.cancel()
    await asyncio.gather(*(call.task for call in calls if call.task), return_exceptions=True)

    async def idle() -> bool:
        samples.clear()
        samples.update(await server.metrics())
        return of("num_requests_running") == of("num_requests_waiting") == 0

    await eventually(idle, "hanging up ends them")
    assert of("request_failure_total", code="cancelled") >= 3


async def test_request_ids(client: httpx.AsyncClient, server: Server) -> None:
    """The client's own if it is a sane one; in the answer's head, and in the log's line of its end."""
    given = {"mine-1": True, "a" * 128: True, "has space": False, "a" * 129: False, 'x"y': False}
    for request_id, is_taken in given.items():
        call, text = golden_calls("adder", 1)[0]
        answer = await call.start(client, server.url, **KEY, **{"x-request-id": request_id}).end()
        assert answer.text == text
        shown = answer.headers["x-request-id"]
        assert (shown == request_id) is is_taken
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
        (line,) = [line for line in lines if line.get("request_id") == shown]
        assert line["message"] == "request finished" and line["model"] == "adder"
        assert line["completion_tokens"] == 14


def num_connections(server: Server, name: str) -> int:
    """Clients that a gateway serves."""
    connections = psutil.Process(server.pid(name)).net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and bool(each.raddr) for each in connections)


async def streams_on_both(client: httpx.AsyncClient, server: Server) -> list[tuple[Call, str]]:
    """At least 20 streams, some of them on either gateway."""
    calls: list[tuple[Call, str]] = []
    for call, text in cycle(golden_calls("radio", 30)):
        if len(calls) >= 20 and all(num_connections(server, name) > 2 for name in GATEWAYS):
            return calls
        assert len(calls) < 500, "one gateway takes them all"
        fresh = Call(call.path, call.body)
        calls.append((fresh.start(client, server.url, **KEY), text))
        await eventually(lambda fresh=fresh: fresh.answer.num_events, "it is under way")
    raise AssertionError


async def test_two_gateways_serve_and_die_behind_one_port(server: Server) -> None:
    """One dies: the streams of the other go on. Then that one dies too.

    Who accepts is left to the kernel: of 30 clients at once one gateway took all, now and then.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, **PLAIN) as client:
        for name in GATEWAYS:
            calls = await streams_on_both(client, server)
            server.kill(name)
            answers = await ends([call for call, _ in calls])
            broken = [answer.is_broken for answer in answers]
            assert 0 < sum(broken) < len(calls), "both had streams"
            for answer, (_, text) in zip(answers, calls, strict=True):
                assert answer.is_broken or (answer.is_done and answer.text == text)
            again = golden_calls("adder", 20)
            for call, text in again:
                assert (await call.start(client, server.url, **KEY).end()).text == text
            await eventually(lambda name=name: server.log.count(f"{name} is up") == 2, "and serves")
