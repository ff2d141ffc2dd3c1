"""One HTTP request for text: its prompts become requests, their pieces become the answer.

A request that fails before anything has been sent gets a response with the error's status. After that an
error is the stream's last event, `data: {"error": {...}}`, and the stream ends without `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prism.errors import WireError
from prism.gateway.errors import JsonResponse, error_body, error_response
from prism.gateway.observer import Observer
from prism.gateway.prepare import parse_body, read_body, slo_of, tokenize
from prism.gateway.requests import Request
from prism.gateway.responses import ChatFormat, CompletionFormat, Format, Head, Usage
from prism.gateway.sampling import output_limit, sampling_params
from prism.gateway.schema import CommonRequest
from prism.gateway.schema_chat import ChatRequest
from prism.gateway.service import Gateway
from prism.gateway.streams import Batch, Mailbox, Stream
from prism.gateway.texts import Piece
from prism.gateway.threads import NotBegun, Threads
from prism.gateway.tokenizers import TextModel
from prism.types import RequestId, Tenant

log = logging.getLogger(__name__)

_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_LAST_BYTES = 60.0
"""Seconds that a client has to read its answer after the request's own time is over."""


async def complete(gateway: Gateway, http: HttpRequest, schema: type[CommonRequest]) -> Response:
    """Answer a POST to one of the two endpoints."""
    tenant: Tenant | None = http.state.tenant
    with gateway.http_request():
        arrival = gateway.clock.now()
        with gateway.arriving(tenant):
            limits, server = gateway.config.limits, gateway.config.server
            body = await read_body(http, server.max_body, limits.max_wait)
            threads = Threads(gateway.threads, http, gateway.clock, arrival + limits.max_wait)
            try:
                request = await parse_body(body, schema, threads)
                model = await gateway.text_models.get(request.model, limits.max_wait)
                gateway.dispatcher.refuse(model.name, tenant, arrival)
                prompts = await tokenize(request, model, threads)
            except NotBegun:
                raise gateway.dispatcher.late(gateway.clock.now()) from None
        answer = Answer(gateway, http, request, model, prompts, arrival)
        try:
            return await answer.respond()
        except BaseException:
            answer.close()
            raise


class Answer:
    """The requests of one HTTP request, and their one response."""

    def __init__(
        self,
        gateway: Gateway,
        http: HttpRequest,
        request: CommonRequest,
        model: TextModel,
        prompts: list[list[int]],
        arrival: float,
    ) -> None:
        self._gateway = gateway
        self._http = http
        self._request = request
        self._model = model
        self._arrival = arrival
        self._mailbox = Mailbox(len(prompts), self._cancel_soon)
        self._opened: list[tuple[Request, Stream]] = []
        self._requests = self._make_requests(prompts)
        self._format = self._make_format()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def _source(self) -> str:
        return "messages" if isinstance(self._request, ChatRequest) else "prompt"

    def _make_requests(self, prompts: list[list[int]]) -> list[Request]:
        """All checks happen here, before the first of them is opened."""
        limits, spec = self._gateway.config.limits, self._model.spec
        slo = slo_of(self._http.headers, self._model.config.slo.slo())
        requests = []
        for prompt in prompts:
            limit = output_limit(self._request, spec, len(prompt), self._source)
            requests.append(
                Request(
                    request_id=RequestId(uuid.uuid4().hex),
                    model=self._model.name,
                    prompt=prompt,
                    params=sampling_params(self._request, spec, limit.max_tokens),
                    slo=slo,
                    arrival=self._arrival,
                    latest_start=self._arrival + limits.max_wait,
                    latest_end=self._arrival + limits.request_timeout,
                    clip_max_tokens=limit.is_default,
                    tenant=self._http.state.tenant,
                )
            )
        return requests

    def _make_format(self) -> Format:
        is_chat = isinstance(self._request, ChatRequest)
        head = Head(
            id=("chatcmpl-" if is_chat else "cmpl-") + self._requests[0].request_id,
            created=int(self._arrival),
            model=self._request.model,
            texts=self._model.vocabulary.token_texts,
            with_logprobs=self._request.num_logprobs is not None,
        )
        return ChatFormat(head) if is_chat else CompletionFormat(head)

    # --- the response -----------------------------------------------------------------------------------

    async def respond(self) -> Response:
        """Open the requests and wait for the first piece, or for all of them."""
        self._watcher = asyncio.create_task(self._watch())
        for number, request in enumerate(self._requests):
            self._open(request, number * self._request.num_choices)
        return await (self._respond_stream() if self._request.stream else self._respond_whole())

    async def _respond_whole(self) -> Response:
        collected: list[Piece] = []
        while (batch := await self._mailbox.next()) is not None:
            if batch.failure is not None:
                self.close()
                return error_response(self._translated(batch.failure.error))
            collected += batch.pieces
        self.close()
        num_choices = len(self._requests) * self._request.num_choices
        whole = self._format.whole(collected, num_choices, self._usage())
        return JsonResponse(whole, headers=self._queue_headers())

    async def _respond_stream(self) -> Response:
        first = await self._mailbox.next()
        assert first is not None, "each choice ends with a piece"
        if first.failure is not None:  # nothing has been sent, so the error may have a status
            self.close()
            return error_response(self._translated(first.failure.error))
        self._gateway.http_begun()
        limits = self._gateway.config.limits
        seconds = self._arrival + limits.request_timeout + _LAST_BYTES - self._gateway.clock.now()
        return EventStream(self._events(first), self._close_stream, seconds, self._queue_headers())

    def _queue_headers(self) -> dict[str, str]:
        """How long the slowest of its prompts waited, beside its place and the estimate when it came."""
        waits = [stream.queued for _, stream in self._opened if stream.queued is not None]
        if not waits:
            return {}
        longest = max(waits, key=lambda queued: queued.queue_seconds)
        return {
            "x-prism-queue-ms": f"{longest.queue_seconds * 1e3:.0f}",
            "x-prism-queue-position": str(longest.queue_position),
            "x-prism-estimated-queue-ms": f"{longest.estimated_seconds * 1e3:.0f}",
        }

    async def _events(self, first: Batch) -> AsyncIterator[bytes]:
        """What has come together is sent together, each piece as an event of its own."""
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        batch: Batch | None = first
        while batch is not None:
            events = [self._event(piece, with_usage) for piece in batch.pieces]
            if batch.failure is not None:
                yield b"".join([*events, _event(error_body(self._translated(batch.failure.error)))])
                return
            yield b"".join(events)
            batch = await self._mailbox.next()
        if with_usage:
            yield _event(self._format.usage_chunk(self._usage()))
        yield b"data: [DONE]\n\n"

    def _event(self, piece: Piece, with_usage: bool) -> bytes:
        extra = {"usage": None} if with_usage else {}
        return b"".join(_event(chunk | extra) for chunk in self._format.chunks(piece))

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(request.prompt) for request in self._requests),
            completion_tokens=sum(stream.num_tokens for _, stream in self._opened),
            cached_tokens=sum(stream.cached_tokens for _, stream in self._opened),
        )

    def _translated(self, error: WireError) -> WireError:
        """A worker knows neither the endpoint nor how the client called its limit."""
        names = {"prompt": self._source, "max_tokens": self._request.output_limit[0]}
        return msgspec.structs.replace(error, param=names.get(error.param or "", error.param))

    # --- beginning and end ------------------------------------------------------------------------------

    def _open(self, request: Request, first_choice: int) -> None:
        gateway = self._gateway
        http_id: str = self._http.state.request_id
        observer = Observer(gateway.metrics, request, http_id)
        choices = range(first_choice, first_choice + request.params.n)
        stops, min_tokens = self._request.stop, self._request.min_tokens
        stream = Stream(self._mailbox, self._model, observer, choices, stops, min_tokens)
        gateway.open(request, stream)
        self._opened.append((request, stream))

    async def _watch(self) -> None:
        """Cancel everything when the client goes away."""
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        for request, _ in self._opened:
            self._gateway.cancel(request)

    def _cancel_soon(self) -> None:
        """One of its prompts has failed, which the dispatcher is in the middle of: the others are in vain."""
        asyncio.get_running_loop().call_soon(self._cancel)

    def close(self) -> None:
        """Nothing of this answer runs any more."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._cancel()

    def _close_stream(self) -> None:
        self.close()
        self._gateway.http_ended()


def _event(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class EventStream(Response):
    """Server-sent events. `on_close` is called however it ends; a reader who stalls has `seconds`."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        on_close: Callable[[], None],
        seconds: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers=_STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout(self._seconds):
                await send(start)
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log.warning("a client did not read its answer in time")
        finally:
            self._on_close()
