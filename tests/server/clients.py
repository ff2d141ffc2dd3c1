"""Clients that keep everything they hear, and the questions that they ask."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from prism.demo.catalog import GoldenAnswer, golden_answers

PATIENCE = 300.0
"""Seconds for which a client waits. Nothing takes as long, on whatever machine, unless it hangs."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Choice:
    """One choice as its pieces came in."""

    text: str = ""
    finish: str | None = None
    tokens: list[bytes] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_top: list[int] = field(default_factory=list)


@dataclass
class Answer:
    """All that a client got; grows while the stream goes on."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    status: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    error: dict[str, Any] | None = None
    is_done: bool = False
    """The stream ended as it should, with `[DONE]`."""
    is_broken: bool = False
    """The connection ended before."""
    num_events: int = 0

    @property
    def text(self) -> str:
        """The text of the only choice."""
        (choice,) = self.choices.values()
        return choice.text

    def take(self, chunk: dict[str, Any]) -> None:
        """An event of the stream."""
        self.num_events += 1
        if "error" in chunk:
            self.error = chunk["error"]
            return
        if chunk.get("usage"):
            assert self.usage is None, "usage twice"
            self.usage = {name: chunk["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        for piece in chunk["choices"]:
            self._take_piece(piece)

    def _take_piece(self, piece: dict[str, Any]) -> None:
        choice = self.choices.setdefault(piece["index"], Choice())
        assert choice.finish is None, "something after the end of a choice"
        content = piece.get("delta", piece.get("message"))
        choice.text += piece["text"] if content is None else content.get("content") or ""
        choice.finish = piece["finish_reason"]
        given = piece.get("logprobs")
        if given is None:
            return
        if content is None:
            choice.tokens += [token.encode() for token in given["tokens"]]
            choice.logprobs += given["token_logprobs"]
            choice.num_top += [len(top) for top in given["top_logprobs"] or []]
            return
        for entry in given["content"]:
            choice.tokens.append(bytes(entry["bytes"]))
            choice.logprobs.append(entry["logprob"])
            choice.num_top.append(len(entry["top_logprobs"]))


@dataclass
class Call:
    """A request on its way, and what has come of it so far."""

    path: str
    body: dict[str, Any]
    answer: Answer = field(default_factory=Answer)
    task: asyncio.Task[None] | None = None

    def start(self, client: httpx.AsyncClient, url: str, **headers: str) -> Call:
        """Send it; the answer comes in beside the test."""
        self.task = asyncio.create_task(self._run(client, url + self.path, headers))
        return self

    async def _run(self, client: httpx.AsyncClient, url: str, headers: dict[str, str]) -> None:
        answer = self.answer
        try:
            async with client.stream("POST", url, json=self.body, headers=headers) as response:
                answer.status, answer.headers = response.status_code, response.headers
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    answer.take(json.loads(await response.aread()))
                    answer.is_done = response.status_code == 200
                    return
                async for line in response.aiter_lines():
                    if not line:
                        continue
                    assert not answer.is_done, "something after [DONE]"
                    answer.is_done = line == "data: [DONE]"
                    if not answer.is_done:
                        answer.take(json.loads(line.removeprefix("data: ")))
        except httpx.TransportError:
            answer.is_broken = True

    async def end(self) -> Answer:
        """Everything."""
        assert self.task is not None
        await self.task
        return self.answer


async def ends(calls: Sequence[Call], seconds: float = PATIENCE) -> list[Answer]:
    """All answers, once they have ended."""
    async with asyncio.timeout(seconds):
        return [await call.end() for call in calls]


def golden_call(model: str, golden: GoldenAnswer, **fields: Any) -> Call:
    """A question with a known answer; `fields` are added to its request."""
    return Call(CHAT, {"model": model, "messages": list(golden.messages), "stream": True, **fields})


def golden_calls(model: str, count: int) -> list[tuple[Call, str]]:
    """The first questions, each with its answer."""
    return [(golden_call(model, golden), golden.answer) for golden in golden_answers(model)[:count]]
