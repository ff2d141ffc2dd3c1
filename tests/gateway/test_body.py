"""What a body costs before it is refused, counted: no body of 16 MiB may stop a gateway."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.errors import InvalidRequest
from prism.gateway import body as bodies
from prism.gateway import schema as schemas
from prism.gateway.body import MAX_NAMES, MAX_VALUES, parse_json
from prism.gateway.schema import CommonRequest, parse
from prism.gateway.schema_chat import ChatRequest
from prism.gateway.schema_completions import CompletionRequest

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "m", "messages": [USER]}
TEXT = {"model": "m", "prompt": "hi"}
MANY = 5_000
NAMES = {f"u{number}": 1 for number in range(MANY)}
PART = {"type": "text", "text": "a"}

FLOODS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{}] * MANY}, "messages[0].role"),
    ({"messages": [{"role": "x"}] * MANY}, "messages[0].role"),
    ({"messages": [1] * MANY}, "messages[0]"),
    ({"messages": [USER] * MANY + [1] * MANY}, f"messages[{MANY}]"),
    ({"messages": [USER, USER | NAMES]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": [PART] + [{}] * MANY}]}, "messages[0].content[1].type"),
    ({"messages": [{"role": "user", "content": [1] * MANY}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [PART | NAMES]}]}, "messages[0].content[0]"),
    (NAMES, "u0"),
    ({"stream": True, "stream_options": NAMES}, "stream_options"),
    ({"metadata": NAMES}, "metadata"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"logit_bias": NAMES}, "logit_bias.u0"),
    ({"chat_template_kwargs": {"a": [NAMES]}}, "chat_template_kwargs.a[0]"),
    ({"stop_token_ids": [-1] * MANY}, "stop_token_ids[0]"),
    ({"stop_token_ids": [1] * MANY}, "stop_token_ids"),
    ({"stop": [""] * MANY}, "stop"),
    ({"tools": [[]] * MANY}, "tools"),
]


def parsed(fields: dict[str, Any], schema: type[CommonRequest] = ChatRequest) -> Any:
    return parse(schema, parse_json(json.dumps(fields).encode()))


@pytest.mark.parametrize(("fields", "param"), FLOODS)
def test_validation_ends_at_the_first_errors(
    fields: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All errors were collected, in C: a million messages without content stopped a gateway for 14 s."""
    counts: list[int] = []

    def invalid(error: Any, value: Any, *, original: Any = schemas.invalid) -> InvalidRequest:
        counts.append(error.error_count())
        return original(error, value)  # type: ignore[no-any-return]

    monkeypatch.setattr(schemas, "invalid", invalid)
    with pytest.raises(InvalidRequest) as refused:
        parsed(CHAT | fields)
    assert refused.value.param == param
    assert sum(counts) <= 3, counts


@pytest.mark.parametrize(
    ("flood", "param"),
    [
        (b'"tools":[%s]', "tools"),
        (b'"metadata":{"a":[%s],"b":1},"n":1', "metadata"),
        (b'"n":1,"messages":[{"role":"user","content":[%s]},{"a":"b"}]', "messages"),
        (b'"\\ud800":[%s]', '"\\\\ud800"'),
        (b"[%s]", "model"),
    ],
)
@pytest.mark.parametrize("item", [b"[]", b"{}", b'""', b'{"":[""]}', b"["])
def test_too_many_values_are_not_even_read(
    flood: bytes, item: bytes, param: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five million empty lists took 2 s to read."""
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(InvalidRequest) as refused:
        parse_json(b'{"model":"m",' + flood % b",".join([item] * MAX_VALUES * 2) + b"}")
    assert refused.value.param == param
    assert "more than" in refused.value.message


def test_numbers_and_text_are_no_values_to_be_counted() -> None:
    prompt = [7] * (MAX_VALUES * 2)
    assert parsed(TEXT | {"prompt": [prompt, prompt]}, CompletionRequest).prompt == [prompt, prompt]
    text = '["{\\' * MAX_VALUES
    assert parsed(TEXT | {"prompt": text}, CompletionRequest).prompt == [text]


def test_what_is_asked_for_in_earnest_is_accepted() -> None:
    assert len(parsed(CHAT | {"messages": [USER] * 15_000}).messages) == 15_000
    bias = {str(token): -100 for token in range(MAX_NAMES * 100)}
    assert len(parsed(CHAT | {"logit_bias": bias}).logit_bias) == len(bias)
    assert len(parsed(TEXT | {"prompt": ["a"] * 3, "logit_bias": bias}, CompletionRequest).prompt) == 3
    metadata = {str(number): "" for number in range(16)}
    assert parsed(CHAT | {"metadata": metadata}).metadata == metadata


def test_a_bias_is_not_sent_with_hundreds_of_prompts() -> None:
    """A body of 1.3 MB became 256 messages of as much, all of them made on the loop."""
    fields = {"prompt": ["a"] * 256, "logit_bias": {str(token): -100 for token in range(MANY)}}
    with pytest.raises(InvalidRequest) as refused:
        parsed(TEXT | fields, CompletionRequest)
    assert refused.value.param == "logit_bias"


def _num_values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(_num_values, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(_num_values, value))
    return int(isinstance(value, str))


TEXTS = st.text(st.sampled_from('ab"\\[]{}:, é\n'), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda each: st.lists(each, max_size=4) | st.dictionaries(TEXTS, each, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.integers(0, 20), st.sampled_from([None, 1]))
def test_values_are_counted_as_they_are(fields: dict[str, Any], limit: int, indent: int | None) -> None:
    body = json.dumps(fields, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "MAX_VALUES", limit)
        patch.setattr(bodies, "_SHORTEST", 0)
        if _num_values(fields) <= limit:
            assert parse_json(body) == fields
            return
        with pytest.raises(InvalidRequest) as refused:
            parse_json(body)
    if refused.value.param is not None:
        assert refused.value.param in {bodies.join("", json.dumps(name)[1:-1]) for name in fields}


def test_a_string_without_an_end_is_looked_at_once() -> None:
    assert len(list(bodies._STRING.finditer(b'"' + b'\\"' * MAX_VALUES))) == 1


def test_a_name_given_twice_is_found_in_one_pass() -> None:
    """Each was counted in all: a body of 400 KB took a thread tens of seconds, four of them all threads."""
    num_compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal num_compared
            num_compared += 1
            return str.__eq__(self, other)

    pairs: list[tuple[str, Any]] = [(Name(number), 1) for number in range(MANY)]
    with pytest.raises(InvalidRequest) as refused:
        bodies._Objects().make([*pairs, (Name(MANY - 1), 2)])
    assert refused.value.param == str(MANY - 1)
    assert num_compared < 10 * MANY
