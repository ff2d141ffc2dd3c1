"""The verb `bench`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prism.cli.bench_options import Made, Objectives, Results, Sending, Server, Traffic
from prism.cli.groups import with_groups
from prism.errors import ConfigError

if TYPE_CHECKING:
    from prism.bench.options import Options


@with_groups
def bench(
    server: Server,
    traffic: Traffic,
    made: Made,
    sending: Sending,
    objectives: Objectives,
    results: Results,
    more_goodput: Annotated[list[str] | None, typer.Argument(metavar="[NAME:MS]...", hidden=True)] = None,
) -> None:
    """Send traffic to an OpenAI-compatible server at its times, and measure what comes back."""
    from prism.bench.run import run_bench

    for word in more_goodput or []:
        if not objectives.goodput or ":" not in word:
            raise ConfigError([f"unexpected {word}"])
    goodput = [*(objectives.goodput or []), *(more_goodput or [])]
    raise typer.Exit(run_bench(_options(server, traffic, made, sending, objectives, results, goodput)))


def _options(
    server: Server,
    traffic: Traffic,
    made: Made,
    sending: Sending,
    objectives: Objectives,
    results: Results,
    goodput: list[str],
) -> Options:
    """The same with its texts read. Raises `ConfigError` for those that cannot be."""
    from prism.bench.options import Options, parse_goodput, parse_headers
    from prism.sim.generate import Synthetic

    values: dict[str, Any] = {}
    for group in (server, traffic, sending, objectives, results):
        values |= asdict(group)
    values |= {
        "synthetic": Synthetic(prompt=traffic.input_len, output=traffic.output_len, **asdict(made)),
        "token_ids": _range(sending.token_ids),
        "headers": parse_headers(values.pop("header") or []),
        "extra_body": _object(sending.extra_body),
        "goodput": parse_goodput(goodput),
        "percentile_metrics": tuple(results.percentile_metrics.split(",")),
        "metric_percentiles": _numbers(results.metric_percentiles),
    }
    return Options(**values)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError([f"--token-ids {text}: must be LOW:HIGH"]) from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"--extra-body: {error}"]) from None
    if not isinstance(value, dict):
        raise ConfigError(["--extra-body: must be a JSON object"])
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError([f"--metric-percentiles {text}: must be numbers with commas"]) from None
