"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from prism.errors import InvalidRequest
from prism.gateway.schema import CommonRequest

MAX_PROMPTS = 256
MAX_SEQUENCES = 1024
"""Prompts times `n` of one body."""
MAX_BIASES = 100_000
"""Prompts times names of `logit_bias`, which each of them takes along to its worker."""
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this endpoint."""

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    """One prompt per element; a list of integers is one prompt."""
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if isinstance(value, list) and not 1 <= len(value) <= MAX_PROMPTS:
        raise InvalidRequest(f"must hold token ids alone, or 1 to {MAX_PROMPTS} prompts", param="prompt")
    if not isinstance(value, list) or not all(isinstance(each, str) or _is_tokens(each) for each in value):
        raise InvalidRequest("must be a string, a list of token ids, or a list of either", param="prompt")
    if len({isinstance(each, str) for each in value}) > 1:
        raise InvalidRequest("must not mix strings and token ids", param="prompt")
    return value


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(map(type, value)) == {int}


Prompts = Annotated[
    list[Prompt],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionRequest(CommonRequest):
    """Text to be continued. `echo`, `suffix` and a `best_of` other than `n` are not implemented."""

    prompt: Prompts
    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no log-probabilities."""
        return self.logprobs

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The most output tokens, and the field that says so."""
        return "max_tokens", self.max_tokens or DEFAULT_MAX_TOKENS

    def check(self) -> None:
        """What no single field can tell."""
        super().check()
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest("a best_of other than n is not supported", param="best_of")
        if len(self.prompt) * self.num_choices > MAX_SEQUENCES:
            raise InvalidRequest(f"prompts times n must not pass {MAX_SEQUENCES}", param="n")
        if len(self.prompt) * len(self.logit_bias) > MAX_BIASES:
            raise InvalidRequest(f"prompts times its names must not pass {MAX_BIASES}", param="logit_bias")
