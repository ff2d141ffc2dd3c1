"""Work that would hold up the event loop, in the threads that all requests of a gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from prism.clock import Clock

T = TypeVar("T")


class NotBegun(Exception):
    """No thread was free in time."""


class Pool:
    """The threads of a gateway."""

    def __init__(self, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="text")
        self._num_threads = num_threads
        self._lock = Lock()
        self.num_jobs = 0
        """Those that run, and those that wait for a thread."""

    @property
    def has_idle(self) -> bool:
        """What is submitted now begins at once."""
        return self.num_jobs < self._num_threads

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have a thread do it."""
        with self._lock:
            self.num_jobs += 1
        job = self._executor.submit(work)
        job.add_done_callback(self._ended)
        return job

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self.num_jobs -= 1

    def close(self) -> None:
        """The threads end once they are idle."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Threads:
    """The threads as one HTTP request uses them, whose body has been read.

    It waits for one until `latest`, and while its client is there: of a flood whose senders have gone nothing
    is done that has not begun. What has begun is waited for.
    """

    def __init__(self, pool: Pool, http: HttpRequest, clock: Clock, latest: float) -> None:
        self._pool = pool
        self._http = http
        self._clock = clock
        self._latest = latest

    async def run(self, work: Callable[[], T]) -> T:
        """The value of `work`; raises `NotBegun` or `ClientDisconnect` if it has not begun and never will."""
        if self._pool.has_idle:
            return await asyncio.wrap_future(self._pool.submit(work))
        job = self._pool.submit(work)
        result = asyncio.wrap_future(job)
        changed = asyncio.Event()
        result.add_done_callback(lambda _: changed.set())
        gone = asyncio.create_task(self._until_gone())
        gone.add_done_callback(lambda _: changed.set())
        try:
            await self._clock.wait(changed, self._latest)
            if job.cancel():
                raise ClientDisconnect if gone.done() else NotBegun
            return await result
        finally:
            result.cancel()
            gone.cancel()

    async def _until_gone(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
