"""The endpoints, with a scripted worker."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from prism.config import Config
from prism.errors import Overloaded
from prism.messages import Outputs, Rejected, Started, Submit
from tests.gateway.fakes import MODEL, Script, concatenated, events, running

pytestmark = pytest.mark.anyio


async def test_chat_answers_in_openai_s_shape(config: Config) -> None:
    async with running(config, Script("Grüße, 😀!")) as world:
        response = await world.chat()
        assert response.status_code == 200
        answer = ChatCompletion.model_validate_json(response.content, strict=True)
        assert answer.choices[0].message.content == "Grüße, 😀!"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len("Grüße, 😀!".encode()) + 1
        assert answer.usage.prompt_tokens == len(world.links.submits[0].prompt)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_stream_has_the_same_text_and_usage(config: Config) -> None:
    async with running(config, Script("Grüße, 😀!")) as world:
        response = await world.chat(stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.text)
        assert chunks[-1] == "[DONE]"
        for chunk in chunks[:-1]:
            ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert concatenated(chunks) == "Grüße, 😀!"
        assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-2]["choices"] == []
        assert chunks[-2]["usage"]["completion_tokens"] == len("Grüße, 😀!".encode()) + 1
        assert all(chunk["usage"] is None for chunk in chunks[:-2])


async def test_completions_take_several_prompts_and_choices(config: Config) -> None:
    async with running(config, Script("abc")) as world:
        response = await world.complete(prompt=["x", "y"], n=2, logprobs=2)
        answer = Completion.model_validate_json(response.content, strict=True)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert {choice.text for choice in answer.choices} == {"abc"}
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b", "c"]
        assert logprobs.text_offset == [0, 1, 2]
        assert logprobs.top_logprobs == [
            {"a": -0.5, "`": -1.5},
            {"b": -0.5, "a": -1.5},
            {"c": -0.5, "b": -1.5},
        ]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16


@dataclass
class OneIsRefused(Script):
    """Of two prompts; the other is answered before or after that, all in one turn of the gateway's loop."""

    refused: int = 0
    seen: int = 0

    def answers(self, submit: Submit, incarnation: int) -> Iterator[Outputs | Started | Rejected]:
        error = Overloaded("full", retry_after=3).wire()
        self.reject = error if self.seen == self.refused else None
        self.seen += 1
        return super().answers(submit, incarnation)


@pytest.mark.parametrize("refused", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_has_a_status_as_long_as_nothing_was_sent(
    config: Config, refused: int, stream: bool
) -> None:
    async with running(config, OneIsRefused("abc", refused=refused)) as world:
        response = await world.complete(prompt=["x", "y"], stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"


async def test_models(config: Config) -> None:
    async with running(config) as world:
        assert (await world.client.get("/v1/models")).json()["data"][0]["id"] == MODEL
        assert (await world.client.get(f"/v1/models/{MODEL}")).json()["object"] == "model"
        missing = await world.client.get("/v1/models/nope")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
