"""From a request's fields and its model's defaults to what the worker is told."""

from __future__ import annotations

import random
from dataclasses import dataclass

from prism.errors import ContextLengthExceeded, InvalidRequest
from prism.gateway.schema import CommonRequest
from prism.modelspec import ModelSpec
from prism.types import SamplingParams


@dataclass(frozen=True, slots=True)
class OutputLimit:
    """Most output tokens of a choice; a default may shrink to what the worker's memory holds."""

    max_tokens: int
    is_default: bool


def output_limit(request: CommonRequest, spec: ModelSpec, num_prompt: int, source: str) -> OutputLimit:
    """How long the answer to a prompt may be; `source` is the field that holds the prompt."""
    room = spec.max_position - num_prompt
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens; the model's context holds {spec.max_position}, "
            "with at least one of output",
            param=source,
        )
    name, wanted = request.output_limit
    if wanted is None:
        if request.min_tokens > room:
            raise InvalidRequest(f"is more than the context has room for, {room}", param="min_tokens")
        return OutputLimit(room, is_default=True)
    if wanted > room:
        raise ContextLengthExceeded(
            f"{num_prompt} prompt tokens and {name} {wanted} pass the model's context of {spec.max_position}",
            param=name,
        )
    return OutputLimit(wanted, is_default=False)


def sampling_params(request: CommonRequest, spec: ModelSpec, max_tokens: int) -> SamplingParams:
    """The client's values, else the model's, else neutral ones. A seed is drawn when none is given."""
    _check_tokens(request, spec.vocab_size)
    defaults = spec.default_sampling
    stops = () if request.ignore_eos else spec.eos_token_ids
    top_k = _first(request.top_k, defaults.get("top_k"), 0)
    return SamplingParams(
        n=request.num_choices,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=_first(request.temperature, defaults.get("temperature"), 1.0),
        top_p=_first(request.top_p, defaults.get("top_p"), 1.0),
        top_k=min(max(0, int(top_k)), spec.vocab_size),
        min_p=_first(request.min_p, defaults.get("min_p"), 0.0),
        presence_penalty=_first(request.presence_penalty, None, 0.0),
        frequency_penalty=_first(request.frequency_penalty, None, 0.0),
        repetition_penalty=_first(request.repetition_penalty, defaults.get("repetition_penalty"), 1.0),
        logit_bias=request.logit_bias,
        logprobs=request.num_logprobs,
        stop_token_ids=tuple(dict.fromkeys((*stops, *(request.stop_token_ids or ())))),
        seed=random.getrandbits(63) if request.seed is None else request.seed,
    )


def _first(given: float | None, default: float | None, neutral: float) -> float:
    if given is not None:
        return given
    return neutral if default is None else default


def _check_tokens(request: CommonRequest, vocab_size: int) -> None:
    for index, token in enumerate(request.stop_token_ids or ()):
        if token >= vocab_size:
            text = f"token id {token} is outside the vocabulary of {vocab_size}"
            raise InvalidRequest(text, param=f"stop_token_ids[{index}]")
    for token in request.logit_bias:
        if token >= vocab_size:
            text = f"token id {token} is outside the vocabulary of {vocab_size}"
            raise InvalidRequest(text, param=f"logit_bias.{token}")
    num_logprobs = request.num_logprobs
    if num_logprobs is not None and num_logprobs > vocab_size:
        raise InvalidRequest(f"the vocabulary has only {vocab_size} tokens", param="top_logprobs")
