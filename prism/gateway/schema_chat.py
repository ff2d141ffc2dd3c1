"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from prism.errors import InvalidRequest
from prism.gateway.schema import CommonRequest, Section


class TextPart(Section):
    """A piece of a message; text is the only kind."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(fail_fast=True)]


class InputMessage(Section):
    """What was said to the model. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: None = None


class AssistantMessage(Section):
    """What a model answered, also exactly as the official client returns it."""

    role: Literal["assistant"]
    content: Content
    name: None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


def _kind(message: Any) -> str:
    return "assistant" if isinstance(message, dict) and message.get("role") == "assistant" else "input"


Message = Annotated[
    Annotated[AssistantMessage, Tag("assistant")] | Annotated[InputMessage, Tag("input")],
    Discriminator(_kind),
]


class ChatRequest(CommonRequest):
    """A conversation to be continued by the assistant."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the model's template, such as `enable_thinking`; as vLLM has it."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The most output tokens, and the field that says so."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """What no single field can tell."""
        super().check()
        if self.max_tokens is not None and self.max_tokens != self.output_limit[1]:
            raise InvalidRequest("differs from max_completion_tokens; give one of them", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("only allowed when logprobs is true", param="top_logprobs")

    def template_messages(self) -> list[dict[str, str]]:
        """The conversation as chat templates read it: `developer` is `system`, content is text."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": _text(message.content),
            }
            for message in self.messages
        ]


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
