"""Entry point of the command `prism`; each verb is one function."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prism import __version__
from prism.cli.bench import bench
from prism.cli.profile import profile
from prism.cli.sim_commands import plan, simulate
from prism.errors import ConfigError, ProcessDied

app = typer.Typer(
    help="Serves many LLMs on shared devices through one OpenAI-compatible endpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AdminOption = Annotated[
    str, typer.Option("--admin", envvar="PRISM_ADMIN", help="Admin address of the server.")
]
DEFAULT_ADMIN = "http://127.0.0.1:8001"

app.command()(bench)


@app.command()
def serve(config: Annotated[Path, typer.Argument(help="YAML configuration, or placement JSON.")]) -> None:
    """Serve the models of a configuration until SIGTERM."""
    from prism.agent.main import serve as run_server
    from prism.configfile import load_config

    sys.exit(run_server(load_config(config)))


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving afterwards, until Ctrl-C.")] = False,
) -> None:
    """Start a server with three small models on the CPU and show memory moving between them."""
    from prism.demo.show import run_demo

    sys.exit(run_demo(port=port, keep=keep))


@app.command()
def ps(
    admin: AdminOption = DEFAULT_ADMIN,
    json: Annotated[bool, typer.Option("--json", help="Print what the server says as JSON.")] = False,
) -> None:
    """Show models with their state, memory and requests."""
    from prism.cli.admin import fetch_models
    from prism.cli.table import print_models

    print_models(fetch_models(admin), as_json=json)


@app.command()
def load(
    name: str,
    pin: Annotated[bool | None, typer.Option("--pin/--no-pin", help="Never evict under pressure.")] = None,
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Bring a model onto its device; returns once it can answer."""
    from prism.cli.admin import load_model

    load_model(admin, name, pin)


@app.command()
def unload(name: str, admin: AdminOption = DEFAULT_ADMIN) -> None:
    """Take an idle model off its device."""
    from prism.cli.admin import unload_model

    unload_model(admin, name)


@app.command()
def move(
    name: str,
    device: Annotated[int, typer.Argument(help="Place in the configuration's `devices`, from 0.")],
    admin: AdminOption = DEFAULT_ADMIN,
) -> None:
    """Move a model to another device; returns once new requests go there."""
    from prism.cli.admin import move_model

    move_model(admin, name, device)


@app.command()
def doctor() -> None:
    """Check this machine and print what is missing and what it costs."""
    from prism.cli.doctor import run_doctor

    sys.exit(run_doctor())


app.command()(profile)


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration, for editors."""
    from prism.configfile import config_schema

    typer.echo(config_schema(), nl=False)


app.command()(simulate)
app.command()(plan)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Mistakes of the user end with status 2 and one line each, never a traceback."""
    if platform.system() != "Linux":
        typer.echo(f"prism runs on Linux; this is {platform.system()}", err=True)
        sys.exit(2)
    try:
        return app(arguments)
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except ProcessDied as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
