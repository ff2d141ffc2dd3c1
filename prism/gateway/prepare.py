"""From the bytes of a body to prompts that a worker could run. What takes long does so in a thread."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from prism.errors import BodyTooLarge, ContextLengthExceeded, InvalidRequest
from prism.gateway.body import parse_json
from prism.gateway.schema import CommonRequest, parse
from prism.gateway.schema_chat import ChatRequest
from prism.gateway.schema_completions import CompletionRequest, Prompt
from prism.gateway.templates import Alarm, render_chat
from prism.gateway.threads import Threads
from prism.gateway.tokenizers import TextModel
from prism.types import Slo

RequestT = TypeVar("RequestT", bound=CommonRequest)
_SMALL_BODY = 32 * 1024  # parsed on the loop within a millisecond or two, whatever it holds


async def read_body(http: HttpRequest, limit: int, seconds: float) -> bytes:
    """The body; raises `BodyTooLarge` as soon as it is known to be."""
    length = http.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in http.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
    except TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {seconds:g} s") from None
    return b"".join(chunks)


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes")


async def parse_body(body: bytes, schema: type[RequestT], threads: Threads) -> RequestT:
    """The validated request."""

    def work() -> RequestT:
        return parse(schema, parse_json(body))

    if len(body) <= _SMALL_BODY:
        return work()
    return await threads.run(work)


async def tokenize(request: CommonRequest, model: TextModel, threads: Threads) -> list[list[int]]:
    """The prompts of a request as tokens."""
    alarm = Alarm()

    def work() -> list[list[int]]:
        if isinstance(request, ChatRequest):
            text = render_chat(model, request.template_messages(), request.chat_template_kwargs or {}, alarm)
            return [_encode(text, model, "messages", add_special_tokens=False)]
        assert isinstance(request, CompletionRequest)
        return [_prompt_tokens(prompt, model) for prompt in request.prompt]

    try:
        return await threads.run(work)
    finally:
        alarm.cancel()


def _prompt_tokens(prompt: Prompt, model: TextModel) -> list[int]:
    if isinstance(prompt, str):
        return _encode(prompt, model, "prompt", add_special_tokens=True)
    size = model.spec.vocab_size
    if (bad := next((token for token in prompt if not 0 <= token < size), None)) is not None:
        raise InvalidRequest(f"token id {bad} is outside the vocabulary of {size}", param="prompt")
    return prompt


def _encode(text: str, model: TextModel, source: str, *, add_special_tokens: bool) -> list[int]:
    if model.is_surely_too_long(text):
        raise ContextLengthExceeded(
            f"a prompt of {len(text)} characters cannot fit a context of {model.spec.max_position} tokens",
            param=source,
        )
    tokens = model.vocabulary.encode(text, add_special_tokens=add_special_tokens)
    if not tokens:
        raise InvalidRequest("the prompt has no tokens", param=source)
    return tokens


def slo_of(headers: Mapping[str, str], default: Slo) -> Slo:
    """The model's objectives, unless the client brings its own, in milliseconds."""
    return Slo(
        ttft=_milliseconds(headers, "x-slo-ttft-ms", default.ttft),
        tpot=_milliseconds(headers, "x-slo-tpot-ms", default.tpot),
    )


def _milliseconds(headers: Mapping[str, str], name: str, default: float) -> float:
    if (text := headers.get(name)) is None:
        return default
    try:
        seconds = float(text) / 1000
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86_400:
        raise InvalidRequest(f"{name} must be a positive number of milliseconds", param=name)
    return seconds
