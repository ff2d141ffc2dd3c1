"""What both endpoints accept. Every field does what OpenAI (or vLLM) says, or is refused by name.

Accepted without effect, because they concern nobody but the sender: `user`, `metadata`,
`safety_identifier`, `prompt_cache_key`, and `store: false`. Fields of OpenAI's that Prism does not
implement are accepted only where they say what happens anyway (`NO_OPS`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from prism.errors import InvalidRequest
from prism.gateway.body import join

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_METADATA = 16
"""OpenAI's limit."""
_INT64 = 2**63

NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are known and not implemented, with the values that ask for nothing; null is one for all."""


class Section(BaseModel):
    """Base of all schemas: types are not converted, unknown fields are refused.

    Lists of them fail fast: pydantic makes its errors in C, a million of them in 14 s in which nothing
    else runs.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Section):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop must be a string or a list of up to {MAX_STOPS}", param="stop")
    for index, stop in enumerate(stops):
        param = "stop" if isinstance(value, str) else f"stop[{index}]"
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidRequest(f"must be a string of 1 to {MAX_STOP_LENGTH} characters", param=param)
    return tuple(stops)


def _bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest("must be an object of token ids and numbers", param="logit_bias")
    result = {}
    for name, number in value.items():
        if not name.isascii() or not name.isdecimal() or len(name) > 9:
            raise InvalidRequest("names of logit_bias must be token ids", param=join("logit_bias", name))
        if isinstance(number, bool) or not isinstance(number, int | float) or not -100 <= number <= 100:
            raise InvalidRequest("must be a number from -100 to 100", param=join("logit_bias", name))
        result[int(name)] = float(number)
    return result


def _float(value: Any) -> Any:
    """JSON does not tell 1 from 1.0."""
    return float(value) if type(value) is int and abs(value) < _INT64 else value


Number = Annotated[float, BeforeValidator(_float)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)]
Bias = Annotated[dict[int, float], PlainValidator(_bias, json_schema_input_type=dict[str, float] | None)]
TokenId = Annotated[int, Field(ge=0)]


class CommonRequest(Section):
    """The fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    logit_bias: Bias = Field(default_factory=dict)
    stop: Stops = ()
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = Field(
        default=None, max_length=128
    )
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    skip_special_tokens: Literal[True] | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def num_choices(self) -> int:
        """`n`, which counts as 1 when absent."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None for no log-probabilities."""
        raise NotImplementedError

    @property
    def output_limit(self) -> tuple[str, int | None]:
        """The most output tokens, and the field that says so."""
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """What no single field can tell."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("only allowed when stream is true", param="stream_options")
        limit = self.output_limit[1]
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequest(f"is more than the most output tokens, {limit}", param="min_tokens")


RequestT = TypeVar("RequestT", bound=CommonRequest)


def parse(schema: type[RequestT], fields: dict[str, Any]) -> RequestT:
    """The request in a body; raises `InvalidRequest` naming the field."""
    wanted = {name: value for name, value in fields.items() if not _is_no_op(schema, name, value)}
    try:
        request = schema.model_validate(wanted)
    except ValidationError as error:
        raise invalid(error, wanted) from None
    request.check()
    return request


def _is_no_op(schema: type[CommonRequest], name: str, value: Any) -> bool:
    """Left out before validation: an optional field that is null, and one of `NO_OPS`."""
    if name in schema.model_fields:
        return value is None and not schema.model_fields[name].is_required()
    if name not in NO_OPS:
        path = join("", name)
        raise InvalidRequest(f"unknown field {path}", param=path)
    if value is not None and not any(_equal(value, each) for each in NO_OPS[name]):
        raise InvalidRequest(f"{name} is not supported with this value", param=name)
    return True


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def invalid(error: ValidationError, value: Any) -> InvalidRequest:
    """Pydantic's deepest complaint as OpenAI's error; branches of a union stay out of its `param`."""
    found = [(_path(each["loc"], value), each) for each in error.errors(include_url=False)]
    path, worst = max(found, key=lambda pair: (pair[0].count(".") + pair[0].count("["), pair[1]["loc"] != ()))
    if worst["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field {path}", param=path)
    if worst["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=path)
    return InvalidRequest(f"{path}: {worst['msg']}", param=path)


def _path(location: tuple[int | str, ...], value: Any) -> str:
    """Follow `location` through the body; what is not found there, unless it is last, is a union's tag."""
    path = ""
    for number, part in enumerate(location):
        if isinstance(value, dict) and (part in value or number == len(location) - 1):
            value, path = value.get(part), join(path, part)
        elif isinstance(value, list) and isinstance(part, int):
            value, path = value[part] if part < len(value) else None, join(path, part)
    return path
