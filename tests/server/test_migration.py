"""Two workers on the CPU: models move between them under load, and no stream notices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server import load
from tests.server.clients import PATIENCE, Call, ends, golden_calls
from tests.server.harness import PLAIN, Server
from tests.server.test_kill import assert_alike, num_events
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

DEVICE = {"memory": "64MiB", "slab": "2MiB", "threads": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two devices; nothing moves by itself, and a source has a second to finish."""
    scheduling = {"placement_interval": 0, "drain_timeout": "1s"}
    with Server(devices=[DEVICE, DEVICE], scheduling=scheduling) as server:
        yield server


async def entries(server: Server) -> dict[str, dict[str, Any]]:
    async with httpx.AsyncClient(**PLAIN, timeout=PATIENCE) as client:
        answer = (await client.get(f"{server.admin}/admin/models")).raise_for_status().json()
    return {entry["model"]: entry for entry in answer["models"]}


async def is_alone_at(server: Server, model: str, worker: str) -> bool:
    """It lives there, nothing of it is elsewhere, and no migration is under way."""
    entry = (await entries(server))[model]
    return (entry["homes"], entry["elsewhere"], entry["migration"]) == ([worker], [], None)


async def move(client: httpx.AsyncClient, server: Server, model: str, device: int) -> None:
    answer = await client.post(f"{server.admin}/admin/models/{model}/move", json={"device": device})
    assert answer.status_code == 200, answer.text


async def both_up(server: Server) -> bool:
    async with httpx.AsyncClient(**PLAIN, timeout=PATIENCE) as client:
        answer = (await client.get(f"{server.admin}/admin/models")).json()
    return len(answer["devices"]) == 2


async def test_models_move_under_load_and_every_stream_is_right(
    client: httpx.AsyncClient, server: Server
) -> None:
    """Twenty long streams; two models move while more requests come.

    What a source has not finished in a second goes on at the target with its tokens.
    """
    await eventually(lambda: both_up(server), "both workers are up")
    expected = await load.undisturbed(client, server)
    calls = [call.start(client, server.url) for call in load.calls()]
    await eventually(lambda: num_events(calls) > 100, "the streams are under way")
    homes = {model: entry["worker"] for model, entry in (await entries(server)).items()}
    late: list[tuple[Call, str]] = []
    for model in ("radio", "speller"):
        await move(client, server, model, 1 - int(homes[model][-1]))
        late += golden_calls(model, 3)
        for call, _ in late[-3:]:
            call.start(client, server.url)
    assert not all(call.answer.is_done for call in calls), "the load is too small"
    assert_alike(await ends(calls), expected)
    for call, text in late:
        assert (await call.end()).text == text
    for model in ("radio", "speller"):
        there = f"worker-{1 - int(homes[model][-1])}"
        await eventually(lambda m=model, w=there: is_alone_at(server, m, w), f"{model} is on {there} alone")
    samples = await server.metrics()
    moved = [value for name, value in samples.items() if "migrations_total" in name and "done" in name]
    assert sum(moved) == 2, samples
    assert sum(value for name, value in samples.items() if "resubmissions_total" in name) > 0


async def test_a_source_that_dies_in_a_migration_loses_nothing(
    client: httpx.AsyncClient, server: Server
) -> None:
    expected = await load.undisturbed(client, server)
    calls = [call.start(client, server.url) for call in load.calls()]
    await eventually(lambda: num_events(calls) > 100, "the streams are under way")
    source = (await entries(server))["radio"]["worker"]
    await move(client, server, "radio", 1 - int(source[-1]))
    server.kill(source)
    assert_alike(await ends(calls), expected)
    there = f"worker-{1 - int(source[-1])}"
    await eventually(lambda: is_alone_at(server, "radio", there), f"radio is on {there} alone")
    await eventually(lambda: both_up(server), "both workers are up")


async def test_a_controller_that_dies_in_a_migration_leaves_one_home(
    client: httpx.AsyncClient, server: Server
) -> None:
    """The next one finds the model active on two devices, or on one, and keeps what is so."""
    calls = [call.start(client, server.url) for call in load.calls()[:6]]
    await eventually(lambda: num_events(calls) > 50, "the streams are under way")
    source = (await entries(server))["radio"]["worker"]
    await move(client, server, "radio", 1 - int(source[-1]))
    pid = server.kill("controller")
    await eventually(lambda: server.pid("controller") not in (None, pid), "another one starts")
    for answer in await ends(calls):
        assert answer.is_done and answer.error is None
    for call, text in golden_calls("radio", 3):
        assert (await call.start(client, server.url).end()).text == text


async def test_two_busy_models_come_apart_by_themselves(client: httpx.AsyncClient) -> None:
    """They were put on one device by hand; the other one is free. They need all they can get."""
    scheduling = {"placement_interval": "1s", "demand_window": "10s", "migration_cooldown": "1s"}
    hurried = {"slo": {"tpot": "1ms"}}
    with Server(devices=[DEVICE, DEVICE], scheduling=scheduling, model=hurried) as server:
        await eventually(lambda: both_up(server), "both workers are up")
        are_done = asyncio.Event()

        async def keep_asking(model: str) -> None:
            while not are_done.is_set():
                for call, text in golden_calls(model, 6):
                    assert (await call.start(client, server.url).end()).text == text

        async def are_apart() -> bool:
            found = await entries(server)
            return set(found["radio"]["homes"]).isdisjoint(found["speller"]["homes"])

        async with asyncio.TaskGroup() as group:
            for model in ("radio", "speller"):
                await move(client, server, model, 0)
            assert not await are_apart()
            for model in ("radio", "speller") * 6:
                group.create_task(keep_asking(model))
            await eventually(are_apart, "one of them moves")
            are_done.set()


async def test_whom_a_pin_leaves_no_room_is_served_by_another_device(client: httpx.AsyncClient) -> None:
    """It was refused for two minutes, though the other device had nothing to do."""
    with Server(devices=[DEVICE | {"memory": "24MiB"}] * 2) as server:
        await eventually(lambda: both_up(server), "both workers are up")
        home = {name: entry["homes"] for name, entry in (await entries(server)).items()}
        neighbour = next(name for name in home if name != "adder" and home[name] == home["adder"])
        admin = f"{server.admin}/admin/models/adder"
        assert (await client.post(f"{admin}/load", json={"pinned": True})).status_code == 200
        limits = {"kv_floor_bytes": 16 << 20, "kv_limit_bytes": None}
        answer = await client.post(f"{admin}/limits", json=limits)
        assert answer.json()["without_room"] == [neighbour]

        async def is_served() -> bool:
            body = {"model": neighbour, "prompt": "a", "max_tokens": 1}
            answer = await client.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code in (200, 503), answer.text
            return answer.status_code == 200

        await eventually(is_served, "it has room")
        assert home["adder"] != (await entries(server))[neighbour]["homes"]
