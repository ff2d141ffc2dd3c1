"""The commands `prism simulate` and `prism plan`, as typed; simulate.py carries them out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli.groups import with_groups
from prism.cli.sim_options import SimOptions
from prism.modes import Mode


@with_groups
def simulate(
    given: SimOptions,
    devices: Annotated[int, typer.Option(min=1, max=4096, help="Equal devices.")],
    mode: Annotated[Mode, typer.Option(help="How a device is shared: prism, or a baseline.")] = Mode.PRISM,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default it is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of each model's attainment.")] = None,
    placement: Annotated[
        Path | None,
        typer.Option(
            help="JSON list of each device's models, which stay; else mode prism moves them by load."
        ),
    ] = None,
    expected_load: Annotated[
        bool,
        typer.Option(
            "--expected-load",
            help="Mode prism knows each model's load from the start, as if it were configured.",
        ),
    ] = False,
    step: Annotated[
        bool, typer.Option("--step", help="Step one by one: slow, with the same results.")
    ] = False,
    save_trace: Annotated[Path | None, typer.Option(help="Write the requests, as served, to a CSV.")] = None,
    warm_up: Annotated[
        float, typer.Option(min=0, help="Requests of so many first seconds are served and not reported.")
    ] = 0.0,
) -> None:
    """Run a trace through the shipped policies with a virtual clock and a device's measured costs."""
    from prism.cli.simulate import run_simulate, simulation_inputs

    inputs = simulation_inputs(given, step)
    run_simulate(inputs, mode, devices, placement, output, plot, save_trace, expected_load, warm_up)


@with_groups
def plan(
    given: SimOptions,
    target: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with TTFT in time.")] = 0.99,
    target_tpot: Annotated[float, typer.Option(min=0, max=1, help="The same of TPOT.")] = 0.99,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Several are possible; by default all four.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=4096, help="Most devices.")] = 64,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default it is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of attainment over devices.")] = None,
) -> None:
    """Find the fewest devices, and the placement, with which a trace meets its objectives, in each mode."""
    from prism.cli.simulate import run_plan, simulation_inputs
    from prism.sim.plan import Target

    inputs = simulation_inputs(given)
    run_plan(inputs, mode or list(Mode), most, Target(target, target_tpot), output, plot)
