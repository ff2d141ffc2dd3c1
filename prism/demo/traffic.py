"""The demo's users: chats through the official client, every answer checked to the letter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import openai

from prism.demo.catalog import GoldenAnswer, demo_task, golden_answers
from prism.demo.tasks import Message, is_true

ANSWER_SECONDS = 60.0


class Answer(NamedTuple):
    """What came back for one question."""

    phase: str
    model: str
    ttft: float
    """Seconds to the first piece of text."""
    problem: str | None
    """What was wrong with it."""


class Turn(NamedTuple):
    """A question of a conversation and the answer that must come."""

    messages: tuple[Message, ...]
    expected: str

    def problem(self, model: str, text: str) -> str | None:
        """What is wrong with an answer: it is neither what transformers answers, nor the truth."""
        question = self.messages[-1]["content"]
        if text != self.expected:
            return f"{question!r} was answered {text!r}, expected {self.expected!r}"
        return None if is_true(demo_task(model), question, text) else f"{question!r}: {text!r} is not true"


def turns_of(golden: GoldenAnswer) -> tuple[Turn, ...]:
    """A golden conversation, one turn after the other."""
    messages = golden.messages
    answers = {len(messages): golden.answer} | {
        index: message["content"] for index, message in enumerate(messages) if message["role"] == "assistant"
    }
    return tuple(Turn(messages[:index], answers[index]) for index in sorted(answers))


def conversations(model: str, num_conversations: int) -> tuple[GoldenAnswer, ...]:
    """The longest golden conversations of a model."""
    return tuple(sorted(golden_answers(model), key=lambda g: -len(g.messages)))[:num_conversations]


@dataclass
class Users:
    """Everybody who talks to the server, and what they were told."""

    client: openai.AsyncOpenAI
    answers: list[Answer] = field(default_factory=list)
    num_open: int = 0

    async def ask(self, phase: str, model: str, turn: Turn) -> None:
        """Ask one question and check the answer. A refusal is a wrong answer too."""
        self.num_open += 1
        start = time.monotonic()
        first: float | None = None
        pieces: list[str] = []
        try:
            messages = cast(Any, list(turn.messages))
            stream = await self.client.chat.completions.create(
                model=model, messages=messages, temperature=0, stream=True
            )
            async for chunk in stream:
                if chunk.choices and (text := chunk.choices[0].delta.content):
                    first = first or time.monotonic()
                    pieces.append(text)
            problem = turn.problem(model, "".join(pieces))
        except (
            Exception
        ) as error:  # also the HTTP library's own, which the client lets through while it streams
            problem = f"{turn.messages[-1]['content']!r} failed: {error}"
        finally:
            self.num_open -= 1
        self.answers.append(Answer(phase, model, (first or time.monotonic()) - start, problem))

    async def chat(self, phase: str, model: str, golden: GoldenAnswer) -> None:
        """A conversation; each turn brings all that has been said before."""
        for turn in turns_of(golden):
            await self.ask(phase, model, turn)

    async def chat_at_once(self, phase: str, models: Iterable[str], num_conversations: int) -> None:
        """So many conversations with each of the models, all at the same time."""
        chats = [
            self.chat(phase, model, golden)
            for model in models
            for golden in conversations(model, num_conversations)
        ]
        await asyncio.gather(*chats)

    async def ask_until(self, phase: str, model: str, turns: Sequence[Turn], deadline: float) -> None:
        """One question after the other; an answer that runs at the deadline is waited for."""
        index = 0
        while time.monotonic() < deadline:
            await self.ask(phase, model, turns[index % len(turns)])
            index += 1


def open_client(url: str) -> openai.AsyncOpenAI:
    """The official client. It neither tries again nor asks a proxy: the demo shows what the server does."""
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none-needed",
        max_retries=0,
        timeout=ANSWER_SECONDS,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )


def burst_turns(model: str, user: int, num_users: int) -> list[Turn]:
    """The questions of one user of a burst: the last turn of every golden conversation, others first."""
    turns = [turns_of(golden)[-1] for golden in golden_answers(model)]
    offset = user * len(turns) // num_users
    return turns[offset:] + turns[:offset]
