"""The store's socket: lends memory files to processes of the same user, one connection per loan.

A connection that ends, for whatever reason, ends its loan: a client that dies keeps nothing in use.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from prism.types import ModelId, Seconds
from prism.weights.protocol import Fetch, Manifest, NotPacked, Recall

_MAX_PACKET = 4096
_PATIENCE = Seconds(5.0)
"""A client that connects says at once what it wants."""


class Lender(Protocol):
    """What the server needs of the store."""

    def lend(self, model: ModelId, recall: Callable[[], None] | None) -> tuple[Manifest, int] | None:
        """Manifest and descriptor of a model, which stays until `take_back`; None if not held.

        With a `recall` the loan is a cached one: `recall` is called once if the memory is wanted.
        """
        ...

    async def take_back(self, model: ModelId, recall: Callable[[], None] | None) -> None:
        """The loan, which was made with the same `recall`, has ended."""
        ...


class LendingServer:
    """Listens on a Unix socket that only this user can connect to."""

    def __init__(self, path: Path, lender: Lender) -> None:
        self._path = path
        self._lender = lender
        self._listening: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Make the socket, in place of one that an earlier process left; raises `OSError`."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listening.setblocking(False)
            os.fchmod(listening.fileno(), 0o600)  # before bind: the file never exists with another mode
            self._path.unlink(missing_ok=True)
            listening.bind(str(self._path))
            listening.listen(64)
        except OSError:
            listening.close()
            raise
        self._listening = listening
        self._spawn(self._accept(listening))

    async def close(self) -> None:
        """End all loans and remove the socket."""
        if self._listening is None:
            return
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._listening.close()
        self._listening = None
        self._path.unlink(missing_ok=True)

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listening)
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        """One loan, from the question to the end of the connection."""
        with connection, suppress(OSError, TimeoutError, msgspec.DecodeError):
            if _peer_uid(connection) != os.getuid():
                return
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(_PATIENCE):
                packet = await loop.sock_recv(connection, _MAX_PACKET)
            wanted = msgspec.json.decode(packet, type=Fetch)
            model = ModelId(wanted.model)
            recall = _recall(connection, model) if wanted.cached else None
            if (lent := self._lender.lend(model, recall)) is None:
                connection.send(msgspec.json.encode(NotPacked(model=model)))
                return
            try:
                manifest, fd = lent
                socket.send_fds(connection, [msgspec.json.encode(manifest)], [fd])
                await loop.sock_recv(connection, 1)  # nothing more is said: this returns at the end
            finally:
                await self._lender.take_back(model, recall)


def _recall(connection: socket.socket, model: ModelId) -> Callable[[], None]:
    """Says `Recall` on the connection; a client that is gone has given everything back."""

    def recall() -> None:
        with suppress(OSError):
            connection.send(msgspec.json.encode(Recall(model=model)))

    return recall


def _peer_uid(connection: socket.socket) -> int:
    """User of the process at the other end, as the kernel knows it."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)
