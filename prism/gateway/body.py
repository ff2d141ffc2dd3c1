"""Strict JSON of a request's body: what one parser reads this way and the next one that way is refused."""

from __future__ import annotations

import json
import re
from typing import Any

from prism.errors import InvalidRequest

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises `InvalidRequest` for anything else.

    Refused are bad UTF-8, NaN and Infinity, names given twice, halves of surrogate pairs, and nesting or
    numbers beyond what Python reads.
    """
    try:
        value = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    if _SURROGATE.search(body):
        _refuse_surrogates(value, "")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"{_shown(twice)} is given twice", param=_shown(twice))
    return values


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _refuse_surrogates(value: Any, path: str) -> None:
    if isinstance(value, str):
        if not _is_text(value):
            raise InvalidRequest("half of a surrogate pair is no character", param=path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            if not _is_text(name):
                raise InvalidRequest("half of a surrogate pair is no character", param=path or None)
            _refuse_surrogates(item, join(path, name))


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def join(path: str, part: str | int) -> str:
    """`path` one step further: `a` and `b` make `a.b`, `a` and 0 make `a[0]`."""
    if isinstance(part, int):
        return f"{path}[{part}]"
    return f"{path}.{_shown(part)}" if path else _shown(part)


def _shown(name: str) -> str:
    """A field's name as it may stand in a message: of bounded length, and escaped if it is odd."""
    short = name if len(name) <= 64 else f"{name[:61]}..."
    return short if _NAME.fullmatch(short) else json.dumps(short)
