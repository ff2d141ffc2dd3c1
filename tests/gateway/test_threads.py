"""Waiting for a thread ends with the client's patience, or with the client."""

import asyncio
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from prism.clock import ManualClock
from prism.config import Config
from prism.gateway.service import NUM_THREADS
from prism.gateway.threads import NotBegun, Pool, Threads
from tests.gateway.fakes import Script, running, until

pytestmark = pytest.mark.anyio


class Client:
    """Somebody who has sent a body, and hangs up when told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.http = Request({"type": "http"}, self._receive)

    async def _receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}


class World:
    """One thread, which is busy until `free` is set."""

    def __init__(self) -> None:
        self.free = Event()
        self.pool = Pool(1)
        self.clock = ManualClock()
        self.client = Client()
        self.began: list[str] = []
        self.first = self.pool.submit(self.free.wait)

    def run(self, name: str) -> asyncio.Task[None]:
        threads = Threads(self.pool, self.client.http, self.clock, self.clock.now() + 60)
        return asyncio.create_task(threads.run(lambda: self.began.append(name)))

    async def settle(self) -> None:
        """Everything that was to be done is done."""
        self.free.set()
        last = Threads(self.pool, Client().http, self.clock, self.clock.now() + 60)
        await last.run(lambda: None)
        await until(lambda: self.pool.num_jobs == 0)


@pytest.fixture
def world(anyio_backend: str) -> Iterator[World]:
    world = World()
    yield world
    world.free.set()
    world.pool.close()


async def test_it_begins_when_a_thread_is_free(world: World) -> None:
    task = world.run("a")
    await until(lambda: world.pool.num_jobs == 2)
    world.free.set()
    await task
    assert world.began == ["a"]


async def test_it_waits_for_so_long_and_then_never_begins(world: World) -> None:
    task = world.run("a")
    await until(lambda: world.pool.num_jobs == 2)
    world.clock.advance(59)
    await asyncio.sleep(0)
    assert not task.done()
    world.clock.advance(1)
    await until(task.done)
    with pytest.raises(NotBegun):
        await task
    await world.settle()
    assert not world.began


async def test_nothing_begins_for_a_client_that_has_hung_up(world: World) -> None:
    """Bodies of clients that had gone kept all threads busy one after the other."""
    task = world.run("a")
    await until(lambda: world.pool.num_jobs == 2)
    world.client.left.set()
    await until(task.done)
    with pytest.raises(ClientDisconnect):
        await task
    await world.settle()
    assert not world.began


async def test_what_has_begun_is_waited_for(world: World) -> None:
    began, end = Event(), Event()

    def work() -> str:
        began.set()
        end.wait()
        return "done"

    threads = Threads(world.pool, world.client.http, world.clock, world.clock.now() + 60)
    task = asyncio.create_task(threads.run(work))
    await until(lambda: world.pool.num_jobs == 2)
    world.free.set()
    await until(began.is_set)
    world.clock.advance(100)
    world.client.left.set()
    await until(lambda: not world.clock._sleepers)
    assert not task.done()
    end.set()
    assert await task == "done"


@pytest.mark.parametrize("size", [10, 50_000])
async def test_a_request_that_no_thread_takes_up_is_refused_like_others_that_wait(
    config: Config, size: int
) -> None:
    """It waited for as long as it took, whatever `limits.max_wait` said."""
    async with running(config, Script("fine")) as world:
        assert (await world.chat()).status_code == 200  # the model has been read
        free, threads = Event(), world.gateway.threads
        for _ in range(NUM_THREADS):
            threads.submit(free.wait)
        task = asyncio.create_task(world.chat(user="x" * size))
        await until(lambda: threads.num_jobs == NUM_THREADS + 1)
        world.clock.advance(config.limits.max_wait)
        await until(task.done)
        free.set()
        response = await task
        assert response.status_code == 429
        assert response.json()["error"]["message"] == "no first token within limits.max_wait"
        assert int(response.headers["retry-after"]) >= 1
        assert (await world.chat()).status_code == 200
