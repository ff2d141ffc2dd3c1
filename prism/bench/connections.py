"""HTTP/1.1 connections that are kept for further requests: an asyncio protocol around llhttp.

httpx takes 35 times the processor time and cannot keep up with 10,000 events a second on a core
(benchmarks/bench-client).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any

import httptools

from prism.bench.answers import Answer
from prism.bench.outcomes import Failed, Outcome, TimedOut
from prism.bench.targets import Address

MAX_IDLE_SECONDS = 2.0
"""Servers close idle connections, some after five seconds; a request must not meet that."""

clock = time.perf_counter


class Call:
    """One request on its way. It ends once: whatever comes later is not heard."""

    def __init__(self, request: bytes, timeout: float, on_end: Callable[[Call], None]) -> None:
        self.request = request
        self.answer = Answer()
        self.start = clock()
        self.end = 0.0
        self.outcome: Outcome | None = None
        self.connection: Connection | None = None
        self._on_end = on_end
        self._timer = asyncio.get_running_loop().call_later(timeout, self._time_out, timeout)

    def finish(self, outcome: Outcome) -> None:
        """It has ended."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.end = clock()
        self._timer.cancel()
        self._on_end(self)

    def _time_out(self, seconds: float) -> None:
        self.abandon(TimedOut(seconds))

    def abandon(self, outcome: Outcome) -> None:
        """The client wants no more of it."""
        self.finish(outcome)
        if self.connection is not None:
            self.connection.abort()


class Connection(asyncio.Protocol):
    """Carries one request after the other."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._call: Call | None = None
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._now = 0.0
        self.idle_since = 0.0

    def send(self, call: Call) -> None:
        """The next request; the one before has ended."""
        assert self._transport is not None and self._call is None
        self._call, call.connection = call, self
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(call.request)

    @property
    def is_open(self) -> bool:
        """Something can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        """Nobody listens any more."""
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's side -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")  # uvloop's is its own
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._now = clock()
        if self._parser is None:
            self.abort()  # something that nobody has asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a mistake of ours
        except httptools.HttpParserError as error:
            self._fail(f"an answer that is no HTTP: {error}")
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._fail("the connection was closed" if error is None else f"the connection was lost: {error}")

    def _fail(self, reason: str) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.finish(call.answer.outcome(is_whole=False, reason=reason))

    # --- the parser's side --------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        """See `httptools.HttpResponseParser`."""
        if self._call is not None:
            self._call.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpResponseParser`."""
        if self._call is not None:
            self._call.answer.take(body, self._now)

    def on_message_complete(self) -> None:
        """See `httptools.HttpResponseParser`."""
        call, self._call = self._call, None
        may_stay = self._parser.should_keep_alive()
        self._parser = None
        if call is None or call.outcome is not None or not may_stay:
            self.abort()
        else:
            self.idle_since = self._now
            self._pool.put(self)
        if call is not None:
            call.finish(call.answer.outcome(is_whole=True))


class Pool:
    """Connections to one address."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: list[Connection] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._places: list[tuple[str, int]] = []
        self._tls = ssl.create_default_context() if address.is_secure else None

    async def resolve(self) -> None:
        """Look the name up once. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._address.host, self._address.port, type=1)  # SOCK_STREAM
        self._places = [(str(place[4][0]), int(place[4][1])) for place in found]

    def put(self, connection: Connection) -> None:
        """It has nothing to do."""
        self._idle.append(connection)

    def send(self, call: Call) -> None:
        """On a connection that is open and was used a moment ago, or on a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and clock() - connection.idle_since < MAX_IDLE_SECONDS:
                connection.send(call)
                return
            connection.abort()
        task = asyncio.get_running_loop().create_task(self._open(call))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, call: Call) -> None:
        try:
            connection = await self._connect()
        except OSError as error:
            call.finish(Failed(f"cannot connect: {error}"))
            return
        if call.outcome is not None:  # timed out meanwhile
            connection.abort()
            return
        connection.send(call)

    async def _connect(self) -> Connection:
        """To the first address of the name that answers, which goes first from then on."""
        loop = asyncio.get_running_loop()
        server = self._address.host if self._tls is not None else None
        last: OSError | None = None
        for place in list(self._places):
            try:
                _, connection = await loop.create_connection(
                    lambda: Connection(self), *place, ssl=self._tls, server_hostname=server
                )
            except OSError as error:
                last = error
                continue
            self._places.sort(key=lambda other: other != place)
            return connection
        raise last or OSError("not resolved")

    async def close(self) -> None:
        """Drop all connections that are idle, and those that are being opened."""
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        await asyncio.sleep(0)  # transports that were aborted close in the loop's next round
