"""What uvicorn lacks of HTTP: bounds on heads, and answers to HTTP/1.0 that end with their connection.

A client that never ends its head, or sends one of any size, held its connection and as much memory for ever,
before the application heard of it. And one of HTTP/1.0 was sent chunks, which it does not know.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

HEAD_SECONDS = 30.0
"""For the head of a connection's first request from the connection on, else from its first byte on."""
HEAD_BYTES = 256 * 1024
"""What a head may have beyond the piece in which it ends."""
UNKNOWN_LENGTH = sys.maxsize
"""More than any body that is written has."""


class HeadProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to every head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a head, a body, or both."""
        was_in_head = self._head_timer is not None
        super().data_received(data)
        if was_in_head and self._head_timer is not None:
            self._head_size += len(data)
            if self._head_size > HEAD_BYTES:
                self._refuse("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        if self._head_timer is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        """It ends."""
        self._end_head()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0" and self.cycle is not None:
            self.cycle.send = partial(_send_whole, self.cycle)  # type: ignore[method-assign]

    def _begin_head(self) -> None:
        self._head_size = 0
        self._head_timer = self.loop.call_later(
            HEAD_SECONDS, self._refuse, "The head of the request did not arrive."
        )

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, reason: str) -> None:
        """In plain text, as all that is no HTTP; silently while the request before is being answered."""
        self._end_head()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            self.send_400_response(reason)
        else:
            self.transport.close()


async def _send_whole(cycle: RequestResponseCycle, message: ASGISendEvent) -> None:
    """Without chunks: a body of unknown length ends with the connection (RFC 9112, 6.1 and 6.3)."""
    if message["type"] == "http.response.start":
        names = [name.lower() for name, _ in message.get("headers", ())]
        if b"content-length" not in names:
            cycle.chunked_encoding, cycle.expected_content_length = False, UNKNOWN_LENGTH
    elif message["type"] == "http.response.body":
        is_unknown = cycle.expected_content_length > UNKNOWN_LENGTH // 2
        if is_unknown and not message.get("more_body", False):
            cycle.expected_content_length = len(message.get("body", b""))
    await RequestResponseCycle.send(cycle, message)
