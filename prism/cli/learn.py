"""`prism profile --from-server`: a profile with the costs that a running server has measured."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import httpx
import typer
from rich.console import Console
from rich.table import Table

from prism.calibration.learnt import (
    ENOUGH,
    LEAST_FACTOR,
    MOST_FACTOR,
    Counts,
    Factor,
    Learnt,
    added,
    learn,
    read_counts,
)
from prism.cli.admin import fail
from prism.cli.table import print_whole
from prism.configfile import load_config
from prism.errors import ConfigError
from prism.outputs import check_output
from prism.profile import read_profile, write_profile

TIMEOUT = 10.0


def run_learn(
    server: str,
    config: Path | None,
    profile: Path | None,
    seconds: float | None,
    output: Path,
) -> None:
    """From the server's metrics since its start, or of the next `seconds`, and the profile that it has."""
    path = _base_of(config, profile)
    base = read_profile(path)
    check_output("--output", output)
    if output.exists() and output.samefile(path):
        raise ConfigError([f"--output {output}: is the server's own profile; write to another file"])
    counts, period = fetch_counts(server), "since its start"
    if seconds is not None:
        typer.echo(f"measuring for {seconds:g} s", err=True)
        sleep(seconds)
        counts, period = added(counts, fetch_counts(server), server), f"in {seconds:g} s"
    learnt = learn(base, counts, path.name, server, period)
    write_profile(learnt.profile, output)
    print_learnt(learnt, output)


def _base_of(config: Path | None, profile: Path | None) -> Path:
    if profile is not None:
        if config is not None:
            raise ConfigError([f"--profile: {config} names one with --from-server; give one of the two"])
        return profile
    if config is None:
        raise ConfigError(["--from-server: the server's profile is needed: --profile FILE, or its CONFIG"])
    named = load_config(config).scheduling.profile
    if named is None:
        raise ConfigError([f"{config}: has no scheduling.profile, so there is nothing to compare with"])
    return Path(named)


def fetch_counts(server: str) -> Counts:
    """What the server has counted until now. Ends the command if it does not answer."""
    try:
        response = httpx.get(f"{server.rstrip('/')}/metrics", timeout=TIMEOUT, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"no answer from {server}: {error}")
    if response.status_code != 200:
        fail(f"{server} has no /metrics (status {response.status_code}); server.port has them")
    return read_counts(response.text, server)


def print_learnt(learnt: Learnt, path: Path) -> None:
    """A row for each model and kind of work, and what is doubtful."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("MODEL", "WORK"):
        table.add_column(name, no_wrap=True)
    for name in ("SEEN", "MEASURED", "PREDICTED", "FACTOR"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("FROM", no_wrap=True)
    for (model, kind), factor in learnt.factors.items():
        seen = factor.seen
        table.add_row(
            model,
            kind,
            str(seen.count),
            f"{seen.seconds:.3f} s",
            f"{seen.predicted:.3f} s",
            f"{factor.value:.3f}",
            _origin(kind, factor),
        )
    print_whole(console, table)
    for (model, kind), factor in learnt.factors.items():
        if factor.is_wild:
            doubt = f"{factor.value:.3g} times the profile is beyond {LEAST_FACTOR:g} to {MOST_FACTOR:g}"
            ask = "is it a profile of this device, and had the server it to itself?"
            typer.echo(f"WARNING: {model}, {kind}: {doubt}: {ask}", err=True)
    console.print(f"written to {path}")


def _origin(kind: str, factor: Factor) -> str:
    match factor.origin:
        case "model":
            return "its own"
        case "all":
            return f"all models (fewer than {ENOUGH[kind]} of its own)"
        case "none":
            return f"unchanged (fewer than {ENOUGH[kind]})"
