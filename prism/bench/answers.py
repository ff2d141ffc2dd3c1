"""Reads a streamed answer as it comes in: when pieces with tokens came, what was counted, how it ended."""

from __future__ import annotations

from typing import Any

import msgspec

from prism.bench.outcomes import Failed, Finished, Outcome, Refused

MAX_MESSAGE = 4096
"""Bytes kept of an error's text."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    delta: _Delta | None = None


class Usage(msgspec.Struct):
    """Tokens as the server counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Answer:
    """One answer. Bytes go in, `outcome` comes out when they have ended."""

    def __init__(self) -> None:
        self.status = 0
        self.times: list[float] = []
        """When pieces with tokens came."""
        self.usage: Usage | None = None
        self._is_done = False
        self._error: str | None = None
        self._rest = b""
        """A line that is not complete; of a refusal, its text."""

    def take(self, data: bytes, now: float) -> None:
        """Bytes of the body that came now."""
        if self.status != 200:
            self._rest = (self._rest + data)[:MAX_MESSAGE]
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._is_done = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:  # ValidationError is one
            self._error = self._error or f"an event that cannot be read: {error}"
            return
        if event.error is not None:
            self._error = self._error or f"an error event: {message_of(event.error)}"
        if event.usage is not None:
            self.usage = event.usage
        if event.choices:
            choice = event.choices[0]
            self._is_done = self._is_done or choice.finish_reason is not None
            if not _is_role(choice):
                self.times.append(now)

    def outcome(self, *, is_whole: bool, reason: str = "") -> Outcome:
        """How it ended; `is_whole` if the body has come to its end, else `reason` says what happened."""
        if self.status not in (0, 200):
            return Refused(self.status, _refusal(self._rest))
        if not is_whole and not self._is_done:
            return Failed(self._error or reason)
        if self._error is not None:
            return Failed(self._error)
        if not self._is_done:
            return Failed("the stream ended before the answer did")
        return Finished() if self.times else Failed("an answer without a token")


def _is_role(choice: _Choice) -> bool:
    """A chat's piece without text: the first one of many servers, or the end alone."""
    delta = choice.delta
    if delta is None:
        return False
    return not (delta.content or delta.reasoning or delta.reasoning_content)


def message_of(error: Any) -> str:
    """The text in OpenAI's error object, or whatever there is."""
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)


def _refusal(text: bytes) -> str:
    try:
        body = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text.decode(errors="replace").strip()
    return message_of(body.get("error", body) if isinstance(body, dict) else body)
