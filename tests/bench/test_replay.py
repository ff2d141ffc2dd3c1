"""The client against a server that behaves, and one that does not."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter

import pytest

from prism.bench.outcomes import Failed, Finished, Outcome, Record, Refused, TimedOut
from prism.bench.replay import Replay
from prism.bench.targets import Defaults, Target, make_targets
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned
from prism.errors import ConfigError
from tests.bench.fake_server import FakeServer, Kind
from tests.support.waiting import PATIENCE, eventually

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def target(url: str, endpoint: str = "/v1/completions") -> Target:
    return make_targets(["m"], None, Defaults(url, endpoint))["m"]


def plans(at: Target, count: int, gap: float = 0.0, output: int = 3) -> list[Planned]:
    return [Planned(i, i * gap, at, 5, output) for i in range(count)]


def requests(planned: list[Planned], kinds: list[Kind]) -> list[bytes]:
    """Each with a prompt whose first token is the given one."""
    return [
        encode_all([plan], Style(token_ids=(kind, kind + 1)), 0)[0]
        for plan, kind in zip(planned, kinds, strict=True)
    ]


async def replay(url: str, kinds: list[Kind], timeout: float = PATIENCE, **options: int) -> list[Record]:
    planned = plans(target(url), len(kinds))
    return (await Replay(planned, requests(planned, kinds), timeout=timeout, **options).run()).records


async def test_tokens_are_timed_and_counted() -> None:
    async with FakeServer() as server:
        (record,) = await replay(server.url, [Kind.NORMAL])
    assert record.outcome == Finished()
    assert (record.input_tokens, record.output_tokens, len(record.times)) == (5, 3, 3)
    assert 0 <= record.start < record.times[0] <= record.times[-1] <= record.end
    assert record.tpot == pytest.approx((record.latency - record.ttft) / 2)
    assert sum(record.itls) == pytest.approx(record.latency - record.ttft)


async def test_connections_are_kept() -> None:
    async with FakeServer() as server:
        records = await replay(server.url, [Kind.NORMAL] * 20, max_concurrency=1)
        assert server.num_connections == 1
    assert [record.outcome for record in records] == [Finished()] * 20


async def test_an_event_may_come_in_two_reads() -> None:
    async with FakeServer() as server:
        (record,) = await replay(server.url, [Kind.BURST])
    assert record.outcome == Finished()
    assert (record.output_tokens, len(record.times)) == (3, 3)


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (Kind.REFUSE, Refused(429, "too many")),
        (Kind.DROP, Failed("the connection was closed")),
        (Kind.SILENT, Failed("the connection was closed")),
        (Kind.ERROR_EVENT, Failed("an error event: out of luck")),
        (Kind.EARLY_END, Failed("the stream ended before the answer did")),
    ],
)
async def test_endings(kind: Kind, outcome: Outcome) -> None:
    async with FakeServer() as server:
        (record,) = await replay(server.url, [kind])
    assert record.outcome == outcome


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Kind.NO_HTTP, "an answer that is no HTTP"), (Kind.NOT_JSON, "an event that cannot be")],
)
async def test_nonsense(kind: Kind, reason: str) -> None:
    async with FakeServer() as server:
        (record,) = await replay(server.url, [kind])
    assert isinstance(record.outcome, Failed) and record.outcome.reason.startswith(reason)


async def test_who_waits_for_too_long_gives_up() -> None:
    async with FakeServer() as server:
        records = await replay(server.url, [Kind.HOLD, Kind.NORMAL], timeout=1.0)
        await eventually(lambda: not server.num_open, "the server learns of it")
    assert [record.outcome for record in records] == [TimedOut(1.0), Finished()]
    assert len(records[0].times) == 1


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    (record,) = await replay(url, [Kind.NORMAL])
    assert isinstance(record.outcome, Failed) and record.outcome.reason.startswith("cannot connect: ")


async def test_a_name_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.invalid"):
        await replay("http://nowhere.invalid", [Kind.NORMAL])


async def test_every_request_ends_once_whatever_happens() -> None:
    kinds = list(Kind) * 20
    heard: Counter[int] = Counter()
    async with FakeServer() as server:
        planned = plans(target(server.url), len(kinds), gap=0.001)
        run = Replay(
            planned, requests(planned, kinds), timeout=4.0, on_end=lambda r: heard.update([r.request.index])
        )
        records = (await run.run()).records
    assert [record.request for record in records] == planned
    assert heard == Counter(range(len(kinds)))
    expected: dict[int, type] = {
        Kind.NORMAL: Finished,
        Kind.REFUSE: Refused,
        Kind.HOLD: TimedOut,
        Kind.BURST: Finished,
    }
    for kind, record in zip(kinds, records, strict=True):
        assert isinstance(record.outcome, expected.get(kind, Failed)), (kind, record.outcome)


async def test_requests_leave_at_their_times_though_nothing_comes_back() -> None:
    async with FakeServer() as server:
        planned = plans(target(server.url), 20, gap=0.01)
        run = asyncio.create_task(
            Replay(planned, requests(planned, [Kind.HOLD] * 20), timeout=PATIENCE).run()
        )
        await eventually(lambda: len(server.bodies) == 20, "all of them leave")
        assert not run.done()
        server.release.set()
        records = (await run).records
    for record in records:
        assert record.outcome == Finished()
        assert record.start >= record.request.at - 0.001
    assert records[0].end > records[-1].start


async def test_who_interrupts_gets_an_end_for_every_request() -> None:
    async with FakeServer() as server:
        planned = plans(target(server.url), 30, gap=0.01)
        planned += [Planned(30, 3600.0, target(server.url), 5, 3)]
        ended: list[Record] = []
        kinds = [Kind.NORMAL, Kind.HOLD] * 15 + [Kind.NORMAL]
        replay = Replay(planned, requests(planned, kinds), timeout=PATIENCE, on_end=ended.append)
        run = asyncio.create_task(replay.run())
        await eventually(lambda: len(ended) >= 4 and len(server.bodies) >= 10, "some end", pause=0.001)
        replay.stop()
        records, duration = await run
    assert [record.request for record in records] == planned
    outcomes = Counter(record.outcome for record in records)
    assert set(outcomes) == {Finished(), Failed("interrupted")}
    assert outcomes[Finished()] >= 4
    assert records[-1].outcome == Failed("interrupted")
    assert duration < 100, "the time of requests that never left counts"


async def test_a_bound_on_requests_at_a_time_delays_the_others() -> None:
    async with FakeServer() as server:
        records = await replay(server.url, [Kind.NORMAL] * 6, max_concurrency=2)
    for one in records:
        assert sum(other.start <= one.start < other.end for other in records) <= 2
    assert records[-1].lateness >= records[0].end - records[0].request.at - 0.001


async def test_a_chats_first_piece_is_no_token() -> None:
    async with FakeServer() as server:
        at = target(server.url, "/v1/chat/completions")
        planned = plans(at, 1)
        body = b'{"messages": [], "max_completion_tokens": 3}'
        head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
        (record,) = (await Replay(planned, [head + body], timeout=PATIENCE).run()).records
    assert (record.input_tokens, record.output_tokens, len(record.times)) == (7, 3, 3)
