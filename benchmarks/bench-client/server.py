"""A server that does nothing but stream: TOKENS events a request, GAP seconds apart. Prints its port."""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = chunk(
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1795248815,"model":"m",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)


class Stream(asyncio.Protocol):
    def __init__(self, tokens: int, gap: float) -> None:
        self.tokens, self.gap, self.rest = tokens, gap, b""
        self.usage = chunk(
            b'data: {"choices":[],"usage":{"prompt_tokens":100,"completion_tokens":%d}}\n\n' % tokens
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        self.rest += data
        head, separator, body = self.rest.partition(b"\r\n\r\n")
        length = next(
            int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        if separator and len(body) == length:
            self.rest = b""
            self.transport.write(HEAD)
            self.token(0)

    def token(self, count: int) -> None:
        if count == self.tokens:
            self.transport.write(self.usage + chunk(b"data: [DONE]\n\n") + chunk(b""))
            return
        self.transport.write(TOKEN)
        asyncio.get_running_loop().call_later(self.gap, self.token, count + 1)


async def main(tokens: int, gap: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stream(tokens, gap), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
