"""Hundreds of malformed requests are each refused by name, and requests beside them notice nothing."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from itertools import cycle

import httpx
import psutil
import pytest

from prism.demo.catalog import golden_answers
from prism.gateway.heads import HEAD_SECONDS
from tests.server.clients import CHAT, PATIENCE, golden_call
from tests.server.harness import DEMO, PLAIN, Server
from tests.server.malformed import Bad, all_kinds
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MAX_WAIT = 10


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(limits={"max_wait": MAX_WAIT}) as server:
        yield server


class Valid:
    """Golden questions to all models, as long as the block lasts; all answers must be right."""

    def __init__(self, client: httpx.AsyncClient, server: Server) -> None:
        self._client = client
        self._server = server
        self._is_over = False
        self.num_right = 0

    async def __aenter__(self) -> Valid:
        self._tasks = [asyncio.create_task(self._ask(model)) for model in DEMO for _ in range(2)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _ask(self, model: str) -> None:
        for golden in cycle(golden_answers(model)):
            answer = await golden_call(model, golden).start(self._client, self._server.url).end()
            assert answer.is_done and answer.text == golden.answer, answer
            self.num_right += 1
            if self._is_over:
                return


async def send(client: httpx.AsyncClient, server: Server, bad: Bad) -> httpx.Response:
    request = client.build_request(bad.method, server.url + bad.path, content=bad.body, headers=bad.headers)
    if ".." in bad.path:  # which the library would resolve
        request.url = request.url.copy_with(raw_path=bad.path.encode())
    return await client.send(request)


def assert_refused(bad: Bad, response: httpx.Response) -> None:
    what = (bad.kind, bad.path, bad.body[:200], response.text)
    assert response.status_code == bad.status, what
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, what
    assert error["type"] == "invalid_request_error" and error["message"], what
    assert error["param"] == bad.param, what


async def test_each_is_refused_by_name_while_others_are_served(
    client: httpx.AsyncClient, server: Server
) -> None:
    cases = all_kinds()
    assert len(cases) >= 200 and len(Counter(bad.kind for bad in cases)) >= 20
    slots = asyncio.Semaphore(8)

    async def check(bad: Bad) -> None:
        async with slots:
            assert_refused(bad, await send(client, server, bad))

    async with Valid(client, server) as valid:
        await asyncio.gather(*map(check, cases * 2))
    assert valid.num_right >= 2 * len(DEMO)
    await eventually(lambda: _is_idle(server), "nothing is left")


async def _is_idle(server: Server) -> bool:
    return await server.num_requests() == 0


async def raw(server: Server, data: bytes) -> tuple[int, bytes]:
    """Status and body of what is answered to these bytes, on a connection that is then left open.

    That comes before the gateway gives up on the head of a request.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(data)
        async with asyncio.timeout(HEAD_SECONDS - 5):
            head = await reader.readuntil(b"\r\n\r\n")
            (length,) = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            return int(head.split()[1]), await reader.readexactly(int(length.split(b":")[1]))
    finally:
        writer.close()


def post(*headers: str, body: bytes = b"") -> bytes:
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


GOOD = json.dumps({"model": "adder", "messages": [{"role": "user", "content": "What is 1 + 2?"}]}).encode()
BODIES = {
    "shorter than it says": post(f"Content-Length: {len(GOOD) + 1}", body=GOOD),
    "half of it": post(f"Content-Length: {len(GOOD)}", body=GOOD[: len(GOOD) // 2]),
    "nothing": post("Content-Length: 10"),
    "a chunk that never ends": post("Transfer-Encoding: chunked", body=b"ffff\r\n{"),
}


async def test_bodies_that_do_not_end(client: httpx.AsyncClient, server: Server) -> None:
    async with Valid(client, server):
        answers = await asyncio.gather(*[raw(server, data) for data in BODIES.values()])
    for name, (status, body) in zip(BODIES, answers, strict=True):
        assert status == 400, name
        error = json.loads(body)["error"]
        assert error["type"] == "invalid_request_error", name
        assert "did not arrive" in error["message"], name


@pytest.mark.parametrize(
    "data",
    [
        b"junk\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",  # the beginning of TLS
        post(f"Content-Length: {len(GOOD) - 1}", body=GOOD),  # the rest begins the next request
        post("Content-Length: abc"),
        post("Content-Length: -1"),
        post("Content-Length: 5", "Content-Length: 6"),
        post("Content-Length: 5", "Transfer-Encoding: chunked"),
        post("no colon in this line"),
        post("Bad\x00Name: x"),
        post("Transfer-Encoding: chunked", body=b"zz\r\n"),
    ],
)
async def test_what_is_no_http(server: Server, data: bytes) -> None:
    """Refused below the application, in plain text."""
    status, _ = await raw(server, data)
    assert status == 400


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_of_50_mb_is_not_read(
    client: httpx.AsyncClient, server: Server, is_chunked: bool
) -> None:
    piece = b" " * 100_000

    def upload() -> httpx.Response:
        body = (piece for _ in range(500)) if is_chunked else piece * 500
        return httpx.post(server.url + CHAT, content=body, timeout=PATIENCE, **PLAIN)

    pid = server.pid("gateway-0")
    assert pid is not None
    before = psutil.Process(pid).memory_info().rss
    async with Valid(client, server):
        response = await asyncio.to_thread(upload)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert psutil.Process(pid).memory_info().rss < before + 30 * 2**20
