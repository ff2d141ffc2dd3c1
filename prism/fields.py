"""The types of configuration fields: strict numbers, sizes, durations.

A number is a number: `"2"` and `true` are refused. Text that stands for an environment variable is read as
one, since it cannot be written otherwise.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Annotated

from pydantic import BeforeValidator, Field, Strict

_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TIMES = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


class FromEnvironment(str):
    """The text of a field that is nothing but `${env.NAME}`."""


def parse_size(value: object) -> object:
    """Bytes of `512MiB`, `1.5 GB` or a plain number; other values are left for pydantic to refuse."""
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        number, unit = match.groups()
        if (factor := _SIZES.get(unit.upper())) is not None:
            return int(float(number) * factor)
        raise ValueError(f"unknown size unit {unit!r}; use B, KB, MB, GB, KiB, MiB or GiB")
    return value


def parse_time(value: object) -> object:
    """Seconds of `500ms`, `1.5s`, `2m` or a plain number; other values are left for pydantic to refuse."""
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        number, unit = match.groups()
        if (factor := _TIMES.get(unit)) is not None:
            return float(number) * factor
        raise ValueError(f"unknown time unit {unit!r}; use ms, s, m or h")
    return value


def _as_number(value: object) -> object:
    """A number that an environment variable holds."""
    if isinstance(value, FromEnvironment):
        for read in (int, float):
            with suppress(ValueError):
                return read(value)
    return value


READ_ENVIRONMENT = BeforeValidator(_as_number)
Whole = Annotated[int, Strict(), READ_ENVIRONMENT]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False), READ_ENVIRONMENT]

_SizeText, _TimeText = Annotated[int, Field(ge=0)] | str, Annotated[float, Field(ge=0)] | str
Size = Annotated[int, Strict(), Field(ge=0), BeforeValidator(parse_size, json_schema_input_type=_SizeText)]
"""Bytes."""
Duration = Annotated[
    float,
    Strict(),
    Field(ge=0, allow_inf_nan=False),
    BeforeValidator(parse_time, json_schema_input_type=_TimeText),
]
"""Seconds."""
