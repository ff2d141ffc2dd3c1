"""A trace: which request comes when. CSV with the columns of `COLUMNS`, in any order of rows."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from prism.errors import ConfigError
from prism.types import ModelId

MOST_SECONDS = 1e8
"""Arrivals count from the beginning of a trace. Who gives dates waits for decades that are empty."""
MOST_TOKENS = 10**7
COLUMNS = ("arrival_s", "model_key", "prompt_tokens", "output_tokens")


class TraceRow(NamedTuple):
    """One request."""

    arrival: float
    model: ModelId
    prompt: int
    output: int


def read_trace(path: Path) -> list[TraceRow]:
    """The requests of a file in order of arrival. Raises `ConfigError` that names file, line and column."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin files with a mark
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError([f"{path}: no column {', '.join(missing)}"])
            rows = [_row(path, number, raw) for number, raw in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    if not rows:
        raise ConfigError([f"{path}: holds no requests"])
    return sorted(rows, key=lambda row: row.arrival)


def _row(path: Path, number: int, raw: dict[str, str | None]) -> TraceRow:
    try:
        arrival = float(raw["arrival_s"] or "")
        prompt, output = int(raw["prompt_tokens"] or ""), int(raw["output_tokens"] or "")
    except ValueError as error:
        raise ConfigError([f"{path}, line {number}: {error}"]) from None
    if not 0 <= arrival < float("inf") or prompt < 0 or output < 0 or not raw["model_key"]:
        raise ConfigError([f"{path}, line {number}: numbers must not be negative, model_key not empty"])
    if arrival > MOST_SECONDS:
        raise ConfigError([f"{path}, line {number}: arrival_s is {arrival:g}; it counts from the beginning"])
    if max(prompt, output) > MOST_TOKENS:
        raise ConfigError([f"{path}, line {number}: more than {MOST_TOKENS} tokens"])
    return TraceRow(arrival, ModelId(raw["model_key"]), max(1, prompt), max(1, output))


def write_trace(rows: Iterable[TraceRow], path: Path) -> None:
    """Write a file that `read_trace` reads."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((f"{row.arrival:.6f}", row.model, row.prompt, row.output) for row in rows)


def compress(rows: Sequence[TraceRow], factor: float) -> list[TraceRow]:
    """The same requests `factor` times as fast."""
    return [row._replace(arrival=row.arrival / factor) for row in rows]


def by_popularity(rows: Iterable[TraceRow]) -> list[ModelId]:
    """The models of a trace, the most asked first."""
    counts = Counter(row.model for row in rows)
    return sorted(counts, key=lambda model: (-counts[model], model))


def clip(prompt: int, output: int, context: int | None) -> tuple[int, int]:
    """Shortened to the context: the prompt first, to half of it at the least, then the output."""
    if context is None or prompt + output <= context:
        return prompt, output
    prompt = min(prompt, max(context // 2, context - output))
    return prompt, min(output, context - prompt)
