"""What is too much for a server is refused: requests that it cannot take, and one that kills its workers."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.server.clients import TEXT, Answer, Call, ends, golden_calls
from tests.server.harness import Server
from tests.support.waiting import eventually

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MAX_QUEUE = 4


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Steps are small, so that a long prompt takes many."""
    device = {"max_batch_tokens": 4, "max_batch_size": 2}
    with Server(device=device, limits={"max_queue": MAX_QUEUE}) as server:
        yield server


def assert_overloaded(answer: Answer) -> None:
    assert answer.status == 429 and answer.error is not None and not answer.choices
    assert answer.error["type"] == "rate_limit_error" and answer.error["code"] == "overloaded"
    assert answer.error["param"] is None and answer.error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_what_is_too_much_is_told_when_to_come_again(client: httpx.AsyncClient, server: Server) -> None:
    """Those that are taken are answered rightly, and so are the others once there is room."""
    calls = [call for model in ("radio", "speller") for call in golden_calls(model, 20)]
    num_rounds = 0
    while calls:
        answers = await ends([Call(call.path, call.body).start(client, server.url) for call, _ in calls])
        refused = []
        for answer, (call, text) in zip(answers, calls, strict=True):
            if answer.status == 200:
                assert answer.is_done and answer.text == text
            else:
                assert_overloaded(answer)
                refused.append((call, text))
        assert num_rounds or len(refused) >= 10
        assert len(refused) <= len(calls) - MAX_QUEUE or not refused, "as many as may wait are served"
        calls, num_rounds = refused, num_rounds + 1
    await eventually(lambda: is_idle(server), "nothing is left")


async def is_idle(server: Server) -> bool:
    """Nothing runs or waits, as far as the controller has heard."""
    return await server.num_requests() == 0


async def runs(server: Server, model: str) -> bool:
    """A request for the model is in a step, or was, as far as the controller has heard.

    One that has entered its engine and waits for its first step is not to blame for its worker's death.
    """
    report = (await server.models()).get(model)
    return report is not None and report["num_running"] > 0 and report["kv_used_bytes"] > 0


async def test_a_request_that_kills_workers_ends_with_500(client: httpx.AsyncClient, server: Server) -> None:
    """Its third death is the last; neither those beside it nor its model suffer."""
    poison = Call(TEXT, {"model": "radio", "prompt": "x" * 1900, "max_tokens": 5}).start(client, server.url)
    beside, text = golden_calls("adder", 1)[0]
    beside.start(client, server.url)
    for _ in range(3):
        await eventually(lambda: runs(server, "radio"), "it runs")
        assert poison.answer.status is None
        pid = server.kill("worker-0")
        await eventually(lambda pid=pid: server.pid("worker-0") not in (pid, None), "the next one starts")
    answer = await poison.end()
    assert answer.status == 500 and answer.error is not None
    assert answer.error["type"] == "server_error" and answer.error["code"] == "engine_failure"
    assert "failed 3 times" in answer.error["message"]
    assert (await beside.end()).text == text
    call, text = golden_calls("radio", 1)[0]
    assert (await call.start(client, server.url).end()).text == text
