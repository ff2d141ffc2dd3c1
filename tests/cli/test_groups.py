"""Options in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.testing import CliRunner

from prism.cli.groups import with_groups


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="W.")] = 1
    height: Annotated[int, typer.Option("--tall", help="H.")] = 2


def test_a_command_is_given_its_groups() -> None:
    given: list[Any] = []
    app = typer.Typer()

    def draw(size: Size, name: Annotated[str, typer.Option()], bold: bool = False) -> None:
        given.extend([size, name, bold])

    app.command()(with_groups(draw))
    run = CliRunner().invoke(app, ["--tall", "7", "--name", "x", "--bold"])
    assert run.exit_code == 0, run.output
    assert given == [Size(1, 7), "x", True]
