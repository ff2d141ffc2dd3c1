"""Whom requests go to: served names, endpoints, objectives and tokenizers of a trace's models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from prism.errors import ConfigError
from prism.fields import parse_time
from prism.yamlfile import parse_yaml

CHAT = "/chat/completions"
"""How the path of the chat endpoint ends."""


class Objectives(NamedTuple):
    """Latencies in seconds that a request shall not pass; None where nothing is asked."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing is asked at all."""
        return self == (None, None, None)

    def filled(self, others: Objectives) -> Objectives:
        """Gaps taken from others."""
        return Objectives(*(a if a is not None else b for a, b in zip(self, others, strict=True)))


NONE = Objectives()


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int
    is_secure: bool


@dataclass(frozen=True, slots=True)
class Target:
    """One model of one server."""

    key: str
    """What the trace calls it."""
    model: str
    """What its server calls it."""
    address: Address
    path: str
    tokenizer: Path | None = None
    context: int | None = None
    """Most tokens of prompt and output."""
    objectives: Objectives = NONE

    @property
    def is_chat(self) -> bool:
        """It is asked in messages."""
        return self.path.endswith(CHAT)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a models file says of a key; what it leaves out comes from the command line."""

    model: str | None = None
    base_url: str | None = None
    endpoint: str | None = None
    tokenizer: str | None = None
    context: Annotated[int, Meta(ge=2)] | None = None
    ttft: float | str | None = None
    tpot: float | str | None = None


class Defaults(NamedTuple):
    """What holds for all models unless the models file says otherwise."""

    base_url: str
    endpoint: str
    model: str | None = None
    tokenizer: Path | None = None
    objectives: Objectives = NONE


def read_models(path: Path) -> dict[str, Entry]:
    """A models file, YAML or JSON: entries by the trace's keys. Raises `ConfigError` naming the field."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        entries = msgspec.convert(raw, dict[str, Entry])
    except (OSError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if not entries:
        raise ConfigError([f"{path}: names no model"])
    return entries


def make_targets(
    keys: Iterable[str], entries: Mapping[str, Entry] | None, defaults: Defaults
) -> dict[str, Target]:
    """A target for each key. Raises `ConfigError` with all that is wrong."""
    problems: list[str] = []
    targets = {}
    for key in keys:
        entry = Entry() if entries is None else entries.get(key)
        if entry is None:
            problems.append(f"model {key} of the trace is not in the models file")
            continue
        try:
            targets[key] = _target(key, entry, defaults)
        except ValueError as error:
            problems.append(f"model {key}: {error}")
    if problems:
        raise ConfigError(problems)
    return targets


def _target(key: str, entry: Entry, defaults: Defaults) -> Target:
    base_url, endpoint = entry.base_url or defaults.base_url, entry.endpoint or defaults.endpoint
    if problems := address_problems(base_url, endpoint):
        raise ValueError(problems[0])
    address, prefix = parse_url(base_url)
    own = Objectives(_seconds("ttft", entry.ttft), _seconds("tpot", entry.tpot))
    return Target(
        key=key,
        model=entry.model or defaults.model or key,
        address=address,
        path=prefix + endpoint,
        tokenizer=defaults.tokenizer if entry.tokenizer is None else Path(entry.tokenizer),
        context=entry.context,
        objectives=own.filled(defaults.objectives),
    )


def _seconds(name: str, value: float | str | None) -> float | None:
    if value is None:
        return None
    seconds = parse_time(value)
    if not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise ValueError(f"{name}: must be a positive time, like 0.2 or 200ms")
    return float(seconds)


def address_problems(base_url: str, endpoint: str) -> list[str]:
    """What is wrong with them, each with its name."""
    problems = []
    try:
        parse_url(base_url)
    except ValueError as error:
        problems.append(f"base-url {base_url}: {error}")
    if (
        not endpoint.startswith("/")
        or not endpoint.isascii()
        or not endpoint.isprintable()
        or " " in endpoint
    ):
        problems.append(f"endpoint {endpoint}: must be a path that begins with /")
    return problems


def parse_url(url: str) -> tuple[Address, str]:
    """Address and path of a base URL. Raises `ValueError`."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("holds characters that no address has")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is no http or https address")
    is_secure = parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    return Address(parts.hostname, port, is_secure), parts.path.rstrip("/")
