from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.server.clients import PATIENCE
from tests.server.harness import PLAIN, RUNNING, Server


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Without limits: a test may have any number of streams."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE, **PLAIN) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The demo models on 64 MiB; one for all tests of a file."""
    with Server() as server:
        yield server


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A failure shows what the servers of its test have logged."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        report.sections += [("log of prism serve", server.log) for server in RUNNING]  # type: ignore[attr-defined]
    return report  # type: ignore[return-value]
