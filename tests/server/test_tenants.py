"""Two API keys: what one of them floods the server with hardly delays the other's requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prism.demo.catalog import golden_answers
from tests.server.clients import Call, ends, golden_call, golden_calls
from tests.server.harness import Server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

KEYS = [{"key": "one-secret", "tenant": "flood"}, {"key": "other-secret", "tenant": "light"}]
FLOOD, LIGHT = ({"authorization": f"Bearer {key['key']}"} for key in KEYS)
NUM_FLOOD = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """It runs two sequences of a model at a time; the others wait."""
    limits = {"max_wait": "300s", "max_queue": NUM_FLOOD}
    device = {"max_batch_size": 2}
    with Server(device=device, server={"api_keys": KEYS}, limits=limits) as server:
        yield server


def num_started(calls: list[Call]) -> int:
    """Requests that have their first token, as far as their clients have heard."""
    return sum(call.answer.num_events > 0 for call in calls)


async def test_a_flood_hardly_delays_others(client: httpx.AsyncClient, server: Server) -> None:
    """Order counts, not time: few of the flood start between another's arrival and its own start.

    It cannot be in time, else it would go before a flood that is late whosesoever it was.
    """
    goldens = golden_answers("radio")
    flood = [
        golden_call("radio", goldens[number % len(goldens)], ignore_eos=True, max_tokens=60)
        for number in range(NUM_FLOOD)
    ]
    for call in flood:
        call.start(client, server.url, **FLOOD)
    await eventually(lambda: num_started(flood) >= 4, "the flood is served", 60)
    overtakers = []
    for call, text in golden_calls("radio", 5):
        before = num_started(flood)
        call.start(client, server.url, **LIGHT, **{"x-slo-ttft-ms": "1"})
        await eventually(lambda call=call: call.answer.num_events, "it starts", 60)
        overtakers.append(num_started(flood) - before)
        assert (await call.end()).text == text
    assert num_started(flood) < NUM_FLOOD, "the flood waits still"
    assert sorted(overtakers)[2] <= 6 and sum(overtakers) <= NUM_FLOOD / 2, overtakers
    for answer in await ends(flood):
        assert answer.is_done, "nobody is refused, and nobody starves"


async def test_tenants_are_shown(client: httpx.AsyncClient, server: Server) -> None:
    call, text = golden_calls("adder", 1)[0]
    assert (await call.start(client, server.url, **LIGHT).end()).text == text

    async def shown() -> dict[str, Any] | None:
        answer = (await client.get(f"{server.admin}/admin/models")).json()
        tenants = {entry["tenant"]: entry for entry in answer["tenants"]}
        return tenants if tenants["light"]["decoded_tokens"] >= 14 else None

    tenants = await eventually(shown, "the next report")
    assert set(tenants) == {"flood", "light"}
    assert tenants["light"]["device_seconds"] > 0 and tenants["light"]["prompt_tokens"] > 0
    samples = await server.metrics()
    assert samples['prism:tenant_generation_tokens_total{tenant="light"}'] >= 14
    assert "-secret" not in server.log + str(samples) + str(tenants)
