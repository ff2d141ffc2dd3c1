"""Sockets between processes: permissions, identities, loss and ill-formed messages."""

import asyncio
import logging
import stat
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from prism.messages import Demand, Hello, Role, Stop, encode
from prism.transport import (
    Envelope,
    areceive,
    asend,
    bind_router,
    connect_dealer,
    identity_of,
    receive,
    send,
    socket_address,
    wait_disconnected,
)
from tests.support.turns import OtherTask
from tests.support.waiting import PATIENCE

HELLO = Hello(role=Role.WORKER, name="w0", incarnation=3)


def wait_for(socket: "zmq.Socket[bytes]") -> list[Envelope]:
    assert socket.poll(PATIENCE * 1000)
    return list(receive(socket))


def test_plain_sockets_talk_both_ways(tmp_path: Path) -> None:
    with zmq.Context() as context:
        address = socket_address(tmp_path, "agent")
        router = bind_router(context, address)
        dealer = connect_dealer(context, address, identity_of("w0", 3))
        assert list(receive(dealer)) == []
        assert send(dealer, HELLO)
        assert wait_for(router) == [Envelope("w0.3", HELLO)]
        assert send(router, Stop(grace=1), "w0.3")
        assert wait_for(dealer) == [Envelope("", Stop(grace=1))]
        dealer.close()
        router.close()


def test_only_this_user_can_connect(tmp_path: Path) -> None:
    with zmq.Context() as context, bind_router(context, socket_address(tmp_path, "agent")):
        assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600


def test_a_long_path_is_refused_before_zmq_cuts_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long"):
        socket_address(tmp_path / ("x" * 100), "agent")


def test_a_peer_that_has_gone_is_no_error(tmp_path: Path) -> None:
    with zmq.Context() as context, bind_router(context, socket_address(tmp_path, "agent")) as router:
        assert not send(router, Stop(grace=1), "nobody.1")


def test_ill_formed_messages_are_logged_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    address = socket_address(tmp_path, "agent")
    with zmq.Context() as context:
        router, dealer = bind_router(context, address), connect_dealer(context, address, "w0.1")
        for data in (b"", b"junk", b"\x81\xa4type\xa4Nope", b"\x91" * 100_000):
            dealer.send(data)
        dealer.send_multipart([b"forged", encode(HELLO)])
        send(dealer, HELLO)
        heard: list[Envelope] = []
        with caplog.at_level(logging.ERROR):
            while not heard:
                heard += wait_for(router)
        assert heard == [Envelope("w0.1", HELLO)]
        assert sum("ill-formed" in record.message for record in caplog.records) == 5
        dealer.close()
        router.close()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_asyncio_sockets(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    address = socket_address(tmp_path, "agent")
    router = bind_router(context, address)
    dealer = connect_dealer(context, address, "g0.1")
    gone = asyncio.create_task(wait_disconnected(dealer))
    await asyncio.sleep(0)  # let it begin to watch
    for number in range(1000):
        assert asend(dealer, Demand(model=str(number)))
    heard = []
    async for envelope in areceive(router):
        heard.append(envelope)
        if len(heard) == 1000:
            break
    assert heard == [Envelope("g0.1", Demand(model=str(number))) for number in range(1000)]
    assert asend(router, Stop(grace=2), "g0.1")
    assert await anext(areceive(dealer)) == Envelope("", Stop(grace=2))
    assert not asend(router, Stop(grace=2), "g9.1")
    assert not gone.done()
    router.close(linger=0)
    await asyncio.wait_for(gone, PATIENCE)
    dealer.close(linger=0)
    context.term()


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_there_is_read_without_a_turn_for_others(tmp_path: Path) -> None:
    """What a worker says in one go goes out to clients together."""
    context = zmq.asyncio.Context()
    address = socket_address(tmp_path, "agent")
    router, dealer = bind_router(context, address), connect_dealer(context, address, "g0.1")
    for number in range(100):
        assert asend(dealer, Demand(model=str(number)))
    assert await router.poll(PATIENCE * 1000)
    await asyncio.sleep(0.3)  # until all of them are there
    num_read = 0
    async with OtherTask() as other:
        async for _ in areceive(router):
            num_read += 1
            if num_read == 100:
                break
    assert other.turns < 10
    for socket in (router, dealer):
        socket.close(linger=0)
    context.term()
