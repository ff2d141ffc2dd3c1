"""Sockets between Prism's processes: zmq over unix sockets, one message of prism.messages a frame.

A process that listens has a ROUTER at `ipc://<run_dir>/<file>.sock`, one that calls has a DEALER whose
identity is `name.incarnation`. The run directory is 0700 and the sockets are 0600, so only this user's
processes can connect. Works alike for a plain `zmq.Context` and for `zmq.asyncio.Context`; the functions
that start with `a` are for the latter. Sending never waits: zmq's own queues are without limit, and what
may be in them is bounded by the limits on requests. An ill-formed message is logged and dropped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from prism.messages import AnyMessage, decode, encode

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

SocketT = TypeVar("SocketT", bound="zmq.Socket[Any]")
_MAX_ADDRESS = 107  # bytes of a unix socket's path (sun_path less its end)
_LINGER_MS = 500  # a last message may take so long to leave a process that ends


class Envelope(NamedTuple):
    """A message and the identity of its sender; empty on a DEALER, which has one peer only."""

    sender: str
    message: AnyMessage


def identity_of(name: str, incarnation: int) -> str:
    """What a process calls itself on every connection."""
    return f"{name}.{incarnation}"


def socket_address(run_dir: Path, file: str) -> str:
    """The address of a ROUTER; `file` names the process and, for a child, its incarnation."""
    path = run_dir / f"{file}.sock"
    if len(os.fsencode(path)) > _MAX_ADDRESS:
        raise ValueError(f"{path} is too long for a unix socket: {_MAX_ADDRESS} bytes at most")
    return f"ipc://{path}"


def bind_router(context: zmq.Context[SocketT], address: str) -> SocketT:
    """A listening socket that only this user can reach."""
    socket = context.socket(zmq.ROUTER)
    _set_options(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    socket.bind(address)
    os.chmod(address.removeprefix("ipc://"), 0o600)
    return socket


def connect_dealer(context: zmq.Context[SocketT], address: str, identity: str) -> SocketT:
    """A calling socket; what is sent before the peer answers waits in it."""
    socket = context.socket(zmq.DEALER)
    _set_options(socket)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.connect(address)
    return socket


def _set_options(socket: zmq.Socket[Any]) -> None:
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)


def _frames(message: AnyMessage, to: str | None) -> list[bytes]:
    payload = encode(message)
    return [payload] if to is None else [to.encode(), payload]


def _open(frames: list[bytes]) -> Envelope | None:
    """The message in `frames` (an identity on a ROUTER, then the message), or None for an ill-formed one."""
    sender = frames[0].decode(errors="replace") if len(frames) > 1 else ""
    try:
        if len(frames) > 2:
            raise msgspec.DecodeError(f"{len(frames)} frames")
        return Envelope(sender, decode(frames[-1]))
    except (msgspec.DecodeError, RecursionError) as error:
        log.error("ill-formed message dropped: %s", error, extra={"sender": sender})
        return None


# --- plain sockets ----------------------------------------------------------------------------------


def send(socket: zmq.Socket[Any], message: AnyMessage, to: str | None = None) -> bool:
    """Send, on a ROUTER to the peer of that identity. False if it has gone."""
    try:
        socket.send_multipart(_frames(message, to), zmq.NOBLOCK)
    except zmq.ZMQError as error:
        return _gone(error, to)
    return True


def _gone(error: BaseException, to: str | None) -> bool:
    if not isinstance(error, zmq.ZMQError) or error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
        raise error
    log.debug("message to a peer that has gone", extra={"peer": to})
    return False


def receive(socket: zmq.Socket[Any]) -> Iterator[Envelope]:
    """All messages that have arrived; ends when there is none."""
    while True:
        try:
            frames = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        if (envelope := _open(frames)) is not None:
            yield envelope


# --- asyncio sockets --------------------------------------------------------------------------------


def asend(socket: zmq.asyncio.Socket, message: AnyMessage, to: str | None = None) -> bool:
    """`send` from a coroutine's loop. No awaiting: without a limit on its queue zmq takes it at once."""
    future = cast("asyncio.Future[Any]", socket.send_multipart(_frames(message, to), zmq.NOBLOCK))
    assert future.done()
    error = future.exception()
    return True if error is None else _gone(error, to)


async def areceive(socket: zmq.asyncio.Socket) -> AsyncIterator[Envelope]:
    """Messages as they arrive, until the task is cancelled."""
    while True:
        if (envelope := _open(await socket.recv_multipart())) is not None:
            yield envelope


async def wait_disconnected(socket: zmq.asyncio.Socket) -> None:
    """Return when the peer of a connected DEALER has gone away. Call before the first message is sent."""
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        parse_monitor_message(await monitor.recv_multipart())
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
