"""Strict JSON of a request's body: what one parser reads this way and the next one that way is refused.

Reading takes a time that grows with the bytes alone, and holds the interpreter for a short one: bodies of
very many values are refused before they are read, objects of very many names before they are validated.
"""

from __future__ import annotations

import json
import re
from typing import Any

from prism.errors import InvalidRequest

MAX_VALUES = 100_000
"""Strings, names, lists and objects of a body: of 20,000 messages. Numbers, which may be tokens, are free."""
_SHORTEST = 3
"""Bytes of such a value, with what is between it and the next."""
MAX_NAMES = 256
"""Of one object; pydantic would complain of each."""
_MAPS = frozenset({"", "logit_bias"})
"""Objects that may have any number: validation ends at the first unknown name of a body."""
_CONTAINERS = (list, dict)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)"?\s*+(:?)', re.DOTALL)
"""Also one without an end, so that it is looked at once; and whether it is a name."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises `InvalidRequest` for anything else.

    Refused are bad UTF-8, NaN and Infinity, names given twice, halves of surrogate pairs, more than
    `MAX_VALUES` and `MAX_NAMES`, and nesting or numbers beyond what Python reads.
    """
    _refuse_many(body)
    objects = _Objects()
    try:
        value = json.loads(body.decode(), object_pairs_hook=objects.make, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    if objects.is_one_wide or _SURROGATE.search(body):
        _refuse_in(value, "")
    return value


def _refuse_many(body: bytes) -> None:
    """Raise for more than `MAX_VALUES`. What is text and what is not is found out only if that matters."""
    if len(body) <= MAX_VALUES * _SHORTEST:
        return
    if body.count(b'"') // 2 + body.count(b"[") + body.count(b"{") <= MAX_VALUES:
        return
    num_values, depth, end, field = 0, 0, 0, None
    for string in _STRING.finditer(body):
        num_opened, num_closed = _brackets(body, end, string.start())
        num_values += num_opened
        if num_values > MAX_VALUES:
            break
        num_values += 1
        depth += num_opened - num_closed
        end = string.end()
        if depth == 1 and string[2]:
            field = _shown(string[1][:100].decode(errors="replace"))
    if num_values + _brackets(body, end, len(body))[0] > MAX_VALUES:
        text = f"the body has more than {MAX_VALUES} values other than numbers"
        raise InvalidRequest(text if field is None else f"{field}: {text}", param=field)


def _brackets(body: bytes, start: int, end: int) -> tuple[int, int]:
    opened = body.count(b"[", start, end) + body.count(b"{", start, end)
    return opened, body.count(b"]", start, end) + body.count(b"}", start, end)


class _Objects:
    """Makes the objects of one body."""

    def __init__(self) -> None:
        self.is_one_wide = False
        """One of them has more than `MAX_NAMES`."""

    def make(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Raises for a name given twice."""
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = _shown(_first_twice(pairs))
            raise InvalidRequest(f"{twice} is given twice", param=twice)
        if len(values) > MAX_NAMES:
            self.is_one_wide = True
        return values


def _first_twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is given twice")


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _refuse_in(value: Any, path: str) -> None:
    """Raise for half of a surrogate pair and for an object of too many names."""
    if isinstance(value, dict):
        if len(value) > MAX_NAMES and path not in _MAPS:
            raise InvalidRequest(f"{path} has more than {MAX_NAMES} fields", param=path)
        if not all(map(_is_text, value)):
            raise InvalidRequest("half of a surrogate pair is no character", param=path or None)
    for part, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, str):
            if not _is_text(item):
                raise InvalidRequest("half of a surrogate pair is no character", param=join(path, part))
        elif isinstance(item, _CONTAINERS):
            _refuse_in(item, join(path, part))


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def join(path: str, part: str | int) -> str:
    """`path` one step further: `a` and `b` make `a.b`, `a` and 0 make `a[0]`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{_shown(part)}" if path else _shown(part)


def _shown(name: str) -> str:
    """A field's name as it may stand in a message: of bounded length, and escaped if it is odd."""
    short = name if len(name) <= 64 else f"{name[:61]}..."
    return short if _NAME.fullmatch(short) else json.dumps(short)
