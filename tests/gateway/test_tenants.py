"""Whose a request is, from its key to the message for the worker."""

from __future__ import annotations

import asyncio
import logging

import pytest

from prism.config import Config
from prism.errors import RequestError
from prism.gateway.dispatcher import Dispatcher
from prism.types import Tenant, TenantId
from tests.gateway.fakes import FakeLinks, Script, World, make_config, place, routes, running, until
from tests.gateway.test_requests import CountingSink, make_request

pytestmark = pytest.mark.anyio

KEYS = [{"key": "secret-one", "tenant": "search", "weight": 3}, "secret-two"]


def guarded(config: Config, **sections: object) -> Config:
    return make_config(config.models[0].path, server={"api_keys": KEYS}, **sections)  # type: ignore[arg-type]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_request_goes_out_with_its_tenant_also_when_it_is_sent_again(config: Config) -> None:
    async with running(guarded(config), Script()) as world:
        for key in ("secret-one", "secret-two"):
            assert (await world.chat(headers=bearer(key))).status_code == 200
        sent = [(submit.tenant, submit.weight) for submit in world.links.submits]
        assert sent == [("search", 3.0), ("key-1", 1.0)]
        world.links.script = Script(starts=False)
        task = asyncio.create_task(world.chat(headers=bearer("secret-one")))
        await until(lambda: len(world.links.submits) == 3)
        world.links.script = Script()
        world.gateway.on_worker_up(place(incarnation=2))
        assert (await task).status_code == 200
        again = world.links.submits[-1]
        assert (again.attempt, again.tenant, again.weight) == (2, "search", 3.0)


async def test_without_keys_nobody_has_a_tenant(config: Config) -> None:
    async with running(config, Script()) as world:
        assert (await world.chat()).status_code == 200
        assert [(submit.tenant, submit.weight) for submit in world.links.submits] == [(None, 1.0)]
        assert "tenant=" not in world.gateway.metrics.text().decode()


async def test_tenants_are_shown_and_keys_never(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with running(guarded(config), Script()) as world:
            assert (await world.chat(headers=bearer("secret-one"))).status_code == 200
            assert (await world.chat(headers=bearer("secret-on"))).status_code == 401
            await waiting_is_shown(world, "search", 0)
            text = world.gateway.metrics.text().decode()
    lines = [record for record in caplog.records if record.getMessage() == "request finished"]
    assert [vars(line)["tenant"] for line in lines] == ["search"]
    shown = text + "".join(str(vars(record)) for record in caplog.records)
    assert "secret-" not in shown


async def waiting_is_shown(world: World, tenant: str, count: int) -> None:
    sample = f'prism:tenant_requests_waiting{{tenant="{tenant}"}} {float(count)}'
    await until(lambda: sample in world.gateway.metrics.text().decode())


async def test_a_gateway_full_of_one_tenant_s_requests_takes_others(config: Config) -> None:
    """It holds them while there is no worker, and shows whose they are."""
    dispatcher = Dispatcher(FakeLinks(), max_held=4)
    flood, other = Tenant(TenantId("flood"), 1, 0.5), Tenant(TenantId("other"), 1, 0.5)
    for number in range(4):
        dispatcher.open(make_request(number, tenant=flood), CountingSink(), 0)
    with pytest.raises(RequestError, match="wait already"):
        dispatcher.open(make_request(4, tenant=flood), CountingSink(), 0)
    for number in (5, 6):
        dispatcher.open(make_request(number, tenant=other), CountingSink(), 0)
    with pytest.raises(RequestError, match="wait already"):
        dispatcher.open(make_request(7, tenant=other), CountingSink(), 0)
    assert dispatcher.num_held_by_tenant() == {"flood": 4, "other": 2}


async def test_reading_is_bounded_by_tenant(config: Config) -> None:
    async with running(guarded(config, limits={"max_queue": 1})) as world:
        search, plain = world.gateway.config.server.tenants
        with world.gateway.arriving(search):
            with pytest.raises(RequestError, match="arrive already"), world.gateway.arriving(search):
                pass
            with world.gateway.arriving(plain):
                pass


async def test_held_requests_are_counted_by_tenant(config: Config) -> None:
    async with running(guarded(config), Script(), ready=False) as world:
        task = asyncio.create_task(world.chat(headers=bearer("secret-two")))
        await waiting_is_shown(world, "key-1", 1)
        world.gateway.on_routes(routes("w0"))
        world.gateway.on_worker_up(place())
        assert (await task).status_code == 200
        await waiting_is_shown(world, "key-1", 0)
