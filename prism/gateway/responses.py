"""OpenAI's response objects, whole or in chunks, built from pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prism.gateway.texts import Piece, TokenEntry
from prism.gateway.token_texts import TokenTexts

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all prompts and choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def json(self) -> Json:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Head:
    """What all objects of one response have in common."""

    id: str
    created: int
    model: str
    texts: TokenTexts
    with_logprobs: bool


class Format(Protocol):
    """How one endpoint writes its answers. One instance serves one response."""

    def chunks(self, piece: Piece) -> list[Json]:
        """Events of a stream for one piece."""
        ...

    def usage_chunk(self, usage: Usage) -> Json:
        """The event with the usage and no choices."""
        ...

    def whole(self, pieces: Sequence[Piece], num_choices: int, usage: Usage) -> Json:
        """The answer to a request without streaming."""
        ...


def joined(pieces: Sequence[Piece], num_choices: int) -> list[Piece]:
    """One piece per choice."""
    result = []
    for choice in range(num_choices):
        own = [piece for piece in pieces if piece.choice == choice]
        entries = tuple(entry for piece in own for entry in piece.entries)
        result.append(Piece(choice, "".join(piece.text for piece in own), entries, own[-1].finish))
    return result


class ChatFormat:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> list[Json]:
        """The first chunk of a choice tells the role, the last one the finish reason."""
        chunks = []
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            chunks.append(self._chunk(piece.choice, {"role": "assistant", "content": ""}))
        delta = {"content": piece.text} if piece.text else {}
        chunks.append(self._chunk(piece.choice, delta, self._logprobs(piece.entries), piece.finish))
        return chunks

    def _chunk(
        self, choice: int, delta: Json, logprobs: Json | None = None, finish: str | None = None
    ) -> Json:
        body = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [body])

    def usage_chunk(self, usage: Usage) -> Json:
        """The event with the usage and no choices."""
        return self._object("chat.completion.chunk", []) | {"usage": usage.json()}

    def whole(self, pieces: Sequence[Piece], num_choices: int, usage: Usage) -> Json:
        """The answer to a request without streaming."""
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece.entries),
                "finish_reason": piece.finish,
            }
            for piece in joined(pieces, num_choices)
        ]
        return self._object("chat.completion", choices) | {"usage": usage.json()}

    def _object(self, kind: str, choices: list[Json]) -> Json:
        head = self._head
        return {"id": head.id, "object": kind, "created": head.created, "model": head.model} | {
            "choices": choices
        }

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json | None:
        if not self._head.with_logprobs:
            return None
        content = [
            self._token(entry.token, entry.logprob.logprob)
            | {"top_logprobs": [self._token(token, logprob) for token, logprob in entry.logprob.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        texts = self._head.texts
        return {"token": texts.text(token), "logprob": finite(logprob), "bytes": list(texts.data(token))}


class CompletionFormat:
    """text_completion, in a stream too."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def chunks(self, piece: Piece) -> list[Json]:
        """One event per piece."""
        return [self._object([self._choice(piece)])]

    def usage_chunk(self, usage: Usage) -> Json:
        """The event with the usage and no choices."""
        return self._object([]) | {"usage": usage.json()}

    def whole(self, pieces: Sequence[Piece], num_choices: int, usage: Usage) -> Json:
        """The answer to a request without streaming."""
        choices = [self._choice(piece) for piece in joined(pieces, num_choices)]
        return self._object(choices) | {"usage": usage.json()}

    def _object(self, choices: list[Json]) -> Json:
        head = self._head
        return {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model} | {
            "choices": choices
        }

    def _choice(self, piece: Piece) -> Json:
        logprobs = self._logprobs(piece.entries) if self._head.with_logprobs else None
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish,
        }

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json:
        """`text_offset` counts from the beginning of the choice's text."""
        text = self._head.texts.text
        return {
            "tokens": [text(entry.token) for entry in entries],
            "token_logprobs": [finite(entry.logprob.logprob) for entry in entries],
            "top_logprobs": [
                {text(token): finite(logprob) for token, logprob in entry.logprob.top} for entry in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is impossible."""
    return max(-9999.0, logprob)
