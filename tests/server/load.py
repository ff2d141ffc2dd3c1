"""Twenty long requests of all kinds, whose answers depend on nothing but themselves.

The order of sums depends on the batch, so the logits of two runs differ by rounding, 1e-5 at most. The seeds
were chosen among a few so that no draw is within 1e-4 of another token (as a share of the probability there):
one that was within 4e-7 gave the same text on one make of processor and not on another.
"""

from __future__ import annotations

from typing import Any

import httpx

from prism.demo.catalog import golden_answers
from tests.server.clients import CHAT, TEXT, Answer, Call, ends
from tests.server.harness import Server

NUM_CALLS = 20
LEAST_TOKENS = 256
RADIO_END = "260"
SPELLER_END = "258"
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 20}
VARIED = {"temperature": 1.0, "top_k": 8, "logit_bias": {RADIO_END: -100}}


_undisturbed: list[Answer] = []


def calls() -> list[Call]:
    """Fresh ones."""
    return [_call(number, **settings) for number, settings in enumerate(_SETTINGS)]


async def undisturbed(client: httpx.AsyncClient, server: Server) -> list[Answer]:
    """What a server answers to which nothing happens; the first one is asked for all tests."""
    if not _undisturbed:
        answers = await ends([call.start(client, server.url) for call in calls()])
        for answer in answers:
            assert answer.is_done and answer.usage is not None, answer
            assert answer.usage["completion_tokens"] >= LEAST_TOKENS * len(answer.choices)
        finishes = [choice.finish for answer in answers for choice in answer.choices.values()]
        assert finishes.count("stop") == 3 and set(finishes) == {"stop", "length"}
        _undisturbed.extend(answers)
    return _undisturbed


def _call(number: int, model: str = "radio", *, text: bool = False, **settings: Any) -> Call:
    golden = golden_answers(model)[number]
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "max_tokens": 260 + 8 * number,
        "temperature": 0,
        **settings,
    }
    if not body["stream"]:
        del body["stream_options"]
    if text:
        return Call(TEXT, {"prompt": golden.messages[0]["content"], **body})
    return Call(CHAT, {"messages": list(golden.messages), **body})


_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"model": "speller"},
    {"logprobs": True, "top_logprobs": 4},
    {"logprobs": True, "stop": ["never seen", "dia·xray·"], "max_tokens": 332},
    {"text": True, "logprobs": 3},
    {"frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"model": "speller", "repetition_penalty": 1.1},
    {"logit_bias": {RADIO_END: -100}},
    {"logit_bias": {RADIO_END: -100}, "stream": False},
    {**SAMPLED, "seed": 49},
    {**SAMPLED, "seed": 30, "model": "speller"},
    {**SAMPLED, "seed": 31, "n": 2},
    {**VARIED, "seed": 72, "n": 2, "logprobs": True, "stop": ["ur·sierra", "·bravo·mi"], "max_tokens": 458},
    {**VARIED, "seed": 73, "n": 3, "stream": False},
    {**VARIED, "seed": 74, "frequency_penalty": 0.1},
    {**VARIED, "seed": 15, "min_p": 0.05, "text": True},
    {**VARIED, "seed": 36, "repetition_penalty": 1.05},
    {**VARIED, "seed": 37, "logprobs": True, "top_logprobs": 2},
    {**VARIED, "seed": 62, "text": True, "logprobs": 0},
    {**SAMPLED, "seed": 19, "temperature": 1.2, "top_k": 5},
)
