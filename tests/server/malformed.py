"""Requests of every kind that must be refused, each with the status and the `param` that it must get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.server.clients import CHAT, TEXT

USER = {"role": "user", "content": "What is 1 + 2?"}
CHAT_BODY: dict[str, Any] = {"model": "adder", "messages": [USER]}
TEXT_BODY: dict[str, Any] = {"model": "adder", "prompt": "1 + 2"}
CONTEXT = 2048


class Bad(NamedTuple):
    """One request, and what must be said of it."""

    kind: str
    path: str
    body: bytes
    status: int = 400
    param: str | None = None
    headers: dict[str, str] | None = None
    method: str = "POST"


def all_kinds() -> list[Bad]:
    """Everything below."""
    return [*_bodies(), *_fields(), *_prompts(), *_headers(), *_elsewhere()]


def _bodies() -> Iterator[Bad]:
    """What is no JSON object at all."""
    whole = json.dumps(CHAT_BODY).encode()
    by_kind: dict[str, list[bytes]] = {
        "empty": [b"", b" ", b"\n"],
        "no JSON": [b"{", b"hello", b"{'model': 1}", b'{"model": }', whole[:-1], whole + b"}", whole * 2],
        "no object": [b"[]", b'"text"', b"5", b"null", b"true", b"[" + whole + b"]"],
        "bad UTF-8": [
            b"\xff\xfe{}",
            b'{"model": "\xe9"}',
            whole.replace(b"What", b"\xed\xa0\x80"),
            whole.replace(b"What", b"\xc0\xaf"),
            whole.replace(b"What", b"\xf8\x88\x80\x80\x80"),
            whole.decode().encode("utf-16"),
        ],
        "NaN": [
            whole[:-1] + b', "%s": %s}' % (name, value)
            for name in (b"temperature", b"top_p")
            for value in (b"NaN", b"Infinity", b"-Infinity")
        ],
        "numbers without end": [whole[:-1] + b', "n": ' + b"9" * 5000 + b"}"],
        "deep": [b"[" * 100_000, b'{"a":' * 20_000, b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"],
    }
    for kind, bodies in by_kind.items():
        for body in bodies:
            yield Bad(kind, CHAT, body)
    yield Bad("gzip", CHAT, b"\x1f\x8b\x08\x00rest", headers={"content-encoding": "gzip"})
    for name in ("n", "model", "messages"):
        twice = whole[:-1] + f', "{name}": 1, "{name}": 1}}'.encode()
        yield Bad("twice", CHAT, twice, param=name)
    half = [USER | {"content": "a\ud800"}]
    yield Bad("half a pair", CHAT, _with(messages=half), param="messages[0].content")
    yield Bad("half a pair", CHAT, _with(stop=["x", "\udfff"]), param="stop[1]")
    yield Bad("half a pair", CHAT, _with(user="\ud83d"), param="user")
    yield Bad("half a pair", TEXT, _text(prompt="\udc00"), param="prompt")


_VALUES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("wrong type", "temperature", ("0", True, [], {})),
    ("wrong type", "max_tokens", ("5", 1.5, True, [5])),
    ("wrong type", "n", ("1", 1.5, True)),
    ("wrong type", "stream", ("yes", 1, [])),
    ("wrong type", "model", (5, None, [])),
    ("wrong type", "messages", ("hi", None, 5, {})),
    ("wrong type", "seed", ("1", 0.5)),
    ("wrong type", "logit_bias", ([1], "x", 5)),
    ("wrong type", "user", (5, {})),
    ("wrong type", "ignore_eos", ("no", 0)),
    ("wrong type", "logprobs", (5, "yes")),
    ("wrong type", "presence_penalty", ("1", [1])),
    ("wrong type", "stop_token_ids", (5, "x")),
    ("wrong type", "metadata", (5, [])),
    ("out of range", "n", (0, -1, 129, 10**9, 10**30)),
    ("out of range", "temperature", (-0.1, 2.1, 1e300)),
    ("out of range", "top_p", (0, 1.01, -1)),
    ("out of range", "top_k", (-2, -(10**20))),
    ("out of range", "min_p", (-0.1, 1.1)),
    ("out of range", "presence_penalty", (-2.1, 3)),
    ("out of range", "frequency_penalty", (-9, 2.01)),
    ("out of range", "repetition_penalty", (0, -1)),
    ("out of range", "max_tokens", (0, -5)),
    ("out of range", "seed", (2**63, -(2**63) - 1)),
    ("out of range", "top_logprobs", (-1, 21)),
    ("too many tokens", "max_tokens", (CONTEXT, 10**30)),
    ("too many tokens", "max_completion_tokens", (CONTEXT,)),
    ("too many tokens", "min_tokens", (CONTEXT + 1,)),
    ("stop", "stop", (5, "", ["x"] * 17, "x" * 257)),
    ("unknown field", "colour", ("red", None, 5)),
    ("unknown field", "best", (1,)),
    ("not implemented", "tools", ([{"type": "function", "function": {"name": "f"}}],)),
    ("not implemented", "tool_choice", ("required",)),
    ("not implemented", "response_format", ({"type": "json_object"},)),
    ("not implemented", "reasoning_effort", ("low",)),
    ("not implemented", "store", (True,)),
    ("not implemented", "audio", ({},)),
    ("contradiction", "stream_options", ({"include_usage": True},)),
    ("contradiction", "top_logprobs", (3,)),
)


def _fields() -> Iterator[Bad]:
    """One field is wrong."""
    for kind, name, values in _VALUES:
        for value in values:
            yield Bad(kind, CHAT, _with(**{name: value}), param=name)
    for name in ("model", "messages"):
        yield Bad("missing", CHAT, _without(CHAT_BODY, name), param=name)
    for name in ("model", "prompt"):
        yield Bad("missing", TEXT, _without(TEXT_BODY, name), param=name)
    yield Bad("contradiction", CHAT, _with(max_tokens=5, max_completion_tokens=6), param="max_tokens")
    yield Bad("contradiction", CHAT, _with(max_tokens=5, min_tokens=6), param="min_tokens")
    for value, place in (({"x": 1}, "x"), ({"5": 101}, "5"), ({"264": 1}, "264"), ({"-1": 1}, "-1")):
        yield Bad("logit_bias", CHAT, _with(logit_bias=value), param=f"logit_bias.{place}")
    yield Bad("stop", CHAT, _with(stop=["a", 5]), param="stop[1]")
    yield Bad("stop", CHAT, _with(stop_token_ids=[264]), param="stop_token_ids[0]")
    for model in ("nope", "", "Adder", "adder/", "../adder", "x" * 5000, "\x00"):
        yield Bad("unknown model", CHAT, _with(model=model), 404, "model")
        yield Bad("unknown model", TEXT, _text(model=model), 404, "model")


def _prompts() -> Iterator[Bad]:
    """What the model cannot be given."""
    for size in (CONTEXT, 10 * CONTEXT, 4_000_000):
        yield Bad("too long", CHAT, _with(messages=[USER | {"content": "x" * size}]), param="messages")
        yield Bad("too long", TEXT, _text(prompt="x" * size), param="prompt")
    yield Bad("too long", TEXT, _text(prompt=[5] * CONTEXT), param="prompt")
    yield Bad("too long", CHAT, _with(messages=[USER] * 1000), param="messages")
    for prompt in ([264], [-1], [10**30], [5, 10**6]):
        yield Bad("token id", TEXT, _text(prompt=prompt), param="prompt")
    for prompt in ("", [], [[]], [1, "a"], [True], [None], ["a"] * 257, {"a": 1}, 5):
        yield Bad("prompt", TEXT, _text(prompt=prompt), param="prompt")
    for message, place in (
        ("hi", ""),
        ({"content": "hi"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "tool", "content": "hi"}, ".role"),
        (USER | {"content": 5}, ".content"),
        (USER | {"colour": 5}, ".colour"),
        (USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ".content[0].type"),
    ):
        yield Bad("message", CHAT, _with(messages=[USER, message]), param=f"messages[1]{place}")
    yield Bad("message", CHAT, _with(messages=[]), param="messages")
    given = "chat_template_kwargs"
    yield Bad("message", CHAT, _with(**{given: {"messages": []}}), param=f"{given}.messages")
    yield Bad("too many", TEXT, _text(prompt=["a"] * 20, n=100), param="n")
    for each in ([], {}, "", {"role": "x"}):
        yield Bad("too many values", CHAT, _with(messages=[each] * 150_000), param="messages")
    yield Bad("too many values", CHAT, _with(messages=[1] * 1_000_000), param="messages[0]")


def _headers() -> Iterator[Bad]:
    for name in ("x-slo-ttft-ms", "x-slo-tpot-ms"):
        for value in ("", "abc", "0", "-1", "inf", "nan", "1e12"):
            yield Bad("objective", CHAT, _with(), param=name, headers={name: value})


def _elsewhere() -> Iterator[Bad]:
    """Other paths and methods."""
    yield Bad("path", "/v1/embeddings", _with(), 404)
    yield Bad("path", "/v1/chat/completions/", _with(), 404)
    yield Bad("path", "/v1/../etc/passwd", b"", 404, method="GET")
    yield Bad("path", "/v1/models/nope", b"", 404, "model", method="GET")
    yield Bad("method", CHAT, b"", 405, method="GET")
    yield Bad("method", "/v1/models", b"", 405, method="DELETE")
    yield Bad("method", "/health", b"", 405, method="PUT")


def _with(**fields: Any) -> bytes:
    return json.dumps(CHAT_BODY | fields).encode()


def _text(**fields: Any) -> bytes:
    return json.dumps(TEXT_BODY | fields).encode()


def _without(body: dict[str, Any], name: str) -> bytes:
    return json.dumps({key: value for key, value in body.items() if key != name}).encode()
