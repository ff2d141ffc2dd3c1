"""A small streaming server that misbehaves on demand: the prompt's first token says how."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from enum import IntEnum
from typing import Any


class Kind(IntEnum):
    """First token of a prompt, and what it gets; any other token gets a good answer."""

    REFUSE = 10
    DROP = 11
    SILENT = 12
    HOLD = 13
    NO_HTTP = 14
    ERROR_EVENT = 15
    NOT_JSON = 16
    EARLY_END = 17
    BURST = 18
    NORMAL = 100


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class FakeServer:
    """Use as an async context manager. Keeps the bodies that it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.release = asyncio.Event()
        """Ends what `HOLD` holds."""
        self._readers: list[asyncio.StreamReader] = []
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def num_open(self) -> int:
        """Connections that the client has not closed."""
        return sum(not reader.at_eof() for reader in self._readers)

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        self._readers.append(reader)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length:")[1].split()[0])
                body = json.loads(await reader.readexactly(length))
                self.bodies.append(body)
                if not await self._answer(body, writer):
                    break
        self._writers.discard(writer)
        writer.close()

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        prompt = body.get("prompt", [Kind.NORMAL])
        kind, count = prompt[0], body.get("max_tokens") or body["max_completion_tokens"]
        match kind:
            case Kind.REFUSE:
                text = json.dumps({"error": {"message": "too many"}}).encode()
                writer.write(b"HTTP/1.1 429 X\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
                return True
            case Kind.DROP:  # in the middle of an answer
                writer.write(HEAD + chunk(token("a")))
                return False
            case Kind.SILENT:
                return False
            case Kind.HOLD:
                writer.write(HEAD + chunk(token("a")))
                await self.release.wait()
                writer.write(b"".join(map(chunk, events(body, prompt, count)[1:])) + chunk(b""))
                return True
            case Kind.NO_HTTP:
                writer.write(b"what?\r\n\r\n")
                return False
            case Kind.ERROR_EVENT:
                writer.write(HEAD + chunk(event({"error": {"message": "out of luck"}})) + chunk(b""))
                return True
            case Kind.NOT_JSON:
                writer.write(HEAD + chunk(b"data: {oops\n\n") + chunk(b""))
                return True
            case Kind.EARLY_END:
                writer.write(HEAD + chunk(token("a")) + chunk(b""))
                return True
            case Kind.BURST:  # all in one piece, cut where it hurts
                whole = HEAD + b"".join(map(chunk, events(body, prompt, count))) + chunk(b"")
                writer.write(whole[:-25])
                await writer.drain()
                writer.write(whole[-25:])
                return True
        writer.write(HEAD)
        for piece in events(body, prompt, count):
            writer.write(chunk(piece))
            await writer.drain()
        writer.write(chunk(b""))
        return True


def events(body: dict[str, Any], prompt: Any, count: int) -> list[bytes]:
    """A good answer."""
    usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
    if "messages" in body:
        usage["prompt_tokens"] = 7
        parts = [chat(role="assistant", content=""), *(chat(content="x") for _ in range(count))]
    else:
        parts = [token("x") for _ in range(count)]
    return [*parts, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def chat(**delta: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
