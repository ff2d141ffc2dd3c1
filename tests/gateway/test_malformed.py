"""What is wrong with a request is said by name, and harms nobody."""

import json
from typing import Any

import pytest

from prism.config import Config
from tests.gateway.fakes import CONTEXT, MODEL, make_config, running

pytestmark = pytest.mark.anyio

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
USER = {"role": "user", "content": "hi"}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

CHAT_FIELDS: list[tuple[str, Any, str]] = [
    ("messages", [], "messages"),
    ("messages", "hi", "messages"),
    ("messages", None, "messages"),
    ("messages", ["hi"], "messages[0]"),
    ("messages", [{"content": "hi"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [USER, {"role": "tool", "content": "hi", "tool_call_id": "1"}], "messages[1].role"),
    ("messages", [{"role": "function", "name": "f", "content": "hi"}], "messages[0].role"),
    ("messages", [USER, {"role": "user", "content": 5}], "messages[1].content"),
    ("messages", [USER, {"role": "user", "content": None}], "messages[1].content"),
    (
        "messages",
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "a"},
                    {"type": "image_url", "image_url": {"url": "data:"}},
                ],
            }
        ],
        "messages[0].content[1].type",
    ),
    (
        "messages",
        [{"role": "assistant", "content": "a", "tool_calls": [TOOL_CALL]}],
        "messages[0].tool_calls",
    ),
    ("messages", [USER | {"colour": 1}], "messages[0].colour"),
    ("messages", [USER | {"name": "bob"}], "messages[0].name"),
    ("temperature", 2.1, "temperature"),
    ("temperature", -1, "temperature"),
    ("temperature", "0", "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.1, "top_p"),
    ("top_k", -2, "top_k"),
    ("min_p", 1.5, "min_p"),
    ("presence_penalty", 3, "presence_penalty"),
    ("frequency_penalty", -3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("logit_bias", {"x": 1}, "logit_bias.x"),
    ("logit_bias", {"5": 101}, "logit_bias.5"),
    ("logit_bias", {"99999": 1}, "logit_bias.99999"),
    ("logit_bias", [1], "logit_bias"),
    ("logprobs", 1, "logprobs"),
    ("top_logprobs", 3, "top_logprobs"),
    ("top_logprobs", 21, "top_logprobs"),
    ("stop", 5, "stop"),
    ("stop", "", "stop"),
    ("stop", ["a", 5], "stop[1]"),
    ("stop", ["a"] * 17, "stop"),
    ("stop_token_ids", [99999], "stop_token_ids[0]"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("n", 0, "n"),
    ("n", 129, "n"),
    ("seed", 2**63, "seed"),
    ("seed", 1.5, "seed"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", 10**30, "max_tokens"),
    ("max_completion_tokens", -1, "max_completion_tokens"),
    ("min_tokens", CONTEXT + 1, "min_tokens"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("skip_special_tokens", False, "skip_special_tokens"),
    ("model", 5, "model"),
    ("model", "nope", "model"),
    ("user", 5, "user"),
    ("metadata", {"a": 1}, "metadata.a"),
    ("colour", "red", "colour"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("functions", [{}], "functions"),
    ("function_call", {"name": "f"}, "function_call"),
    ("parallel_tool_calls", False, "parallel_tool_calls"),
    ("response_format", {"type": "json_object"}, "response_format"),
    ("audio", {}, "audio"),
    ("modalities", ["text", "audio"], "modalities"),
    ("prediction", {"type": "content"}, "prediction"),
    ("web_search_options", {}, "web_search_options"),
    ("reasoning_effort", "low", "reasoning_effort"),
    ("verbosity", "low", "verbosity"),
    ("service_tier", "flex", "service_tier"),
    ("store", True, "store"),
    ("echo", False, "echo"),
    ("chat_template_kwargs", 5, "chat_template_kwargs"),
    ("chat_template_kwargs", {"chat_template": "x"}, "chat_template_kwargs.chat_template"),
    ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
    ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs.tokenize"),
]
TEXT_FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", None, "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", "", "prompt"),
    ("prompt", [1, "a"], "prompt"),
    ("prompt", ["a", [1]], "prompt"),
    ("prompt", [True], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [264], "prompt"),
    ("prompt", [10**30], "prompt"),
    ("prompt", ["a"] * 257, "prompt"),
    ("n", 128, "n"),
    ("echo", True, "echo"),
    ("suffix", "x", "suffix"),
    ("best_of", 2, "best_of"),
    ("logprobs", 6, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("max_completion_tokens", 5, "max_completion_tokens"),
    ("messages", [USER], "messages"),
]


def _check(body: Any, param: str) -> None:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert error["message"]


async def test_chat_fields(config: Config) -> None:
    async with running(config) as world:
        for name, value, param in CHAT_FIELDS:
            response = await world.client.post("/v1/chat/completions", json=CHAT | {name: value})
            assert response.status_code == (404 if value == "nope" else 400), (name, value, response.text)
            _check(response.json(), param)
        assert not world.links.sent


async def test_completion_fields(config: Config) -> None:
    async with running(config) as world:
        for name, value, param in TEXT_FIELDS:
            many = {"prompt": ["a"] * 20} if name == "n" else {}
            response = await world.client.post("/v1/completions", json=TEXT | many | {name: value})
            assert response.status_code == 400, (name, value, response.text)
            _check(response.json(), param)
        assert not world.links.sent


async def test_fields_that_contradict_each_other(config: Config) -> None:
    cases = [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ]
    async with running(config) as world:
        for fields, param in cases:
            response = await world.client.post("/v1/chat/completions", json=CHAT | fields)
            assert response.status_code == 400
            _check(response.json(), param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xe9"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"\\ud800": 1}',
        json.dumps(CHAT).encode()[:-1] + b', "model": "x"}',
        json.dumps(CHAT).encode()[:-1] + b', "temperature": 1e999}',
        json.dumps(CHAT | {"user": "\ud800"}).encode(),
        json.dumps(CHAT | {"\udfff": 1}).encode(),
        json.dumps(CHAT).encode() + b"{}",
        json.dumps(CHAT).encode().replace(b"hi", b"\xed\xa0\x80"),
    ],
)
async def test_bodies_that_are_no_json(config: Config, body: bytes) -> None:
    async with running(config) as world:
        response = await world.client.post("/v1/chat/completions", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_field_given_twice_is_named(config: Config) -> None:
    async with running(config) as world:
        body = json.dumps(CHAT).encode()[:-1] + b', "n": 1, "n": 2}'
        response = await world.client.post("/v1/chat/completions", content=body)
        _check(response.json(), "n")


async def test_half_a_surrogate_pair_is_named(config: Config) -> None:
    async with running(config) as world:
        body = json.dumps(CHAT | {"messages": [USER, USER | {"content": "a\ud800"}]}).encode()
        response = await world.client.post("/v1/chat/completions", content=body)
        _check(response.json(), "messages[1].content")


async def test_prompts_that_do_not_fit(config: Config) -> None:
    async with running(config) as world:
        for number, size in enumerate((CONTEXT, CONTEXT * 100)):
            message = {"role": "user", "content": "x" * size}
            response = await world.chat(messages=[message])
            assert response.status_code == 400, number
            assert response.json()["error"]["code"] == "context_length_exceeded"
            _check(response.json(), "messages")
        response = await world.complete(prompt=[5] * CONTEXT)
        assert response.json()["error"]["code"] == "context_length_exceeded"
        _check(response.json(), "prompt")
        response = await world.chat(max_completion_tokens=CONTEXT)
        assert response.json()["error"]["code"] == "context_length_exceeded"
        _check(response.json(), "max_completion_tokens")


@pytest.mark.parametrize("value", ["", "abc", "0", "-1", "inf", "nan", "1e-323"])
@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
async def test_slo_headers(config: Config, name: str, value: str) -> None:
    async with running(config) as world:
        response = await world.chat(headers={name: value})
        assert response.status_code == 400
        _check(response.json(), name)


async def test_unknown_paths_and_methods(config: Config) -> None:
    async with running(config) as world:
        for method, path, status in (
            ("GET", "/nope", 404),
            ("POST", "/v1/embeddings", 404),
            ("GET", "/v1/chat/completions", 405),
            ("DELETE", "/v1/models", 405),
        ):
            response = await world.client.request(method, path)
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_large_body_is_refused(config: Config) -> None:
    small = make_config(config.models[0].path, server={"max_body": 1000})  # type: ignore[arg-type]
    async with running(small) as world:
        response = await world.chat(user="x" * 2000)
        assert response.status_code == 413
        assert response.headers["connection"] == "close"
        num_read = 0

        async def endless():  # type: ignore[no-untyped-def]
            nonlocal num_read
            while True:
                num_read += 1
                yield b" " * 100

        response = await world.client.post("/v1/chat/completions", content=endless())
        assert response.status_code == 413
        assert num_read < 20


async def test_keys(config: Config) -> None:
    guarded = make_config(config.models[0].path, server={"api_keys": ["secret", "other", "voilà"]})  # type: ignore[arg-type]
    async with running(guarded) as world:
        for header in (None, "Bearer", "Bearer wrong", "Basic secret", "Bearer \xe9"):
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            response = await world.client.get("/v1/models", headers=headers)
            assert response.status_code == 401, header
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in ("other", "voilà", "voilà "):  # one that ends with a byte which is white space in Latin-1
            good = await world.client.get("/v1/models", headers={"authorization": f"Bearer {key}".encode()})
            assert good.status_code == 200, key
        assert (await world.client.get("/health")).status_code == 200
