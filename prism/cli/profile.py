"""The command `prism profile`, as typed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from prism.errors import ConfigError


def profile(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration, or placement JSON.")] = None,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("profile.json"),
    device: Annotated[
        int | None, typer.Option(help="Place in the configuration's devices; by default the first.")
    ] = None,
    from_server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure nothing here, but scale a profile by what this running server has measured.",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            help="The one that the server has; by default the configuration's scheduling.profile.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=1e6, help="What the server measures from now on; by default since its start."
        ),
    ] = None,
) -> None:
    """Measure what steps and loads of the configured models cost on a device, or ask a running server."""
    if from_server is not None:
        from prism.cli.learn import run_learn

        if device is not None:
            raise ConfigError(["--device: a server counts its devices together; not with --from-server"])
        run_learn(from_server, config, base, seconds, output)
        return
    given = {"--profile": base, "--seconds": seconds}
    problems = [f"{name}: only with --from-server" for name, value in given.items() if value is not None]
    if config is None:
        problems.append("a configuration is needed, or --from-server")
    if problems or config is None:
        raise ConfigError(problems)
    from prism.calibration.calibrate import run_profile
    from prism.configfile import load_config

    loaded = load_config(config)
    sys.exit(run_profile(loaded, device or 0, output, lambda line: typer.echo(line, err=True)))
