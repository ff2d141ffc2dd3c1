"""The commands `prism simulate` and `prism plan`, as typed; simulate.py carries them out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prism.cli import sim_options as sim
from prism.modes import Mode


def simulate(
    devices: Annotated[int, typer.Option(min=1, max=4096, help="Equal devices.")],
    mode: Annotated[Mode, typer.Option(help="How a device is shared: prism, or a baseline.")] = Mode.PRISM,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default it is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of each model's attainment.")] = None,
    placement: Annotated[
        Path | None, typer.Option(help="JSON list of each device's models; by default they are placed.")
    ] = None,
    step: Annotated[
        bool, typer.Option("--step", help="Step one by one: slow, with the same results.")
    ] = False,
    save_trace: Annotated[Path | None, typer.Option(help="Write the requests, as served, to a CSV.")] = None,
    trace: sim.Trace = None,
    models: sim.Models = None,
    rate_scale: sim.RateScale = 1.0,
    profile: sim.Profile = "h100",
    memory: sim.Memory = None,
    lanes: sim.Lanes = 2,
    slo_scale: sim.SloScale = 5.0,
    seed: sim.Seed = 0,
    num_models: sim.NumModels = 8,
    rate: sim.Rate = 4.0,
    duration: sim.Duration = 600.0,
    alpha: sim.Alpha = 2.1,
    cv: sim.Cv = 1.0,
    on: sim.On = 0.0,
    off: sim.Off = 0.0,
    prompt: sim.Prompt = 300.0,
    answer: sim.Answer = 120.0,
    spread: sim.Spread = 1.0,
) -> None:
    """Run a trace through the shipped policies with a virtual clock and a device's measured costs."""
    from prism.cli.simulate import run_simulate, simulation_inputs

    inputs = simulation_inputs(locals())
    run_simulate(inputs, mode, devices, placement, output, plot, save_trace)


def plan(
    target: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with TTFT in time.")] = 0.99,
    target_tpot: Annotated[float, typer.Option(min=0, max=1, help="The same of TPOT.")] = 0.99,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Several are possible; by default all four.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=4096, help="Most devices.")] = 64,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default it is printed.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Image of attainment over devices.")] = None,
    trace: sim.Trace = None,
    models: sim.Models = None,
    rate_scale: sim.RateScale = 1.0,
    profile: sim.Profile = "h100",
    memory: sim.Memory = None,
    lanes: sim.Lanes = 2,
    slo_scale: sim.SloScale = 5.0,
    seed: sim.Seed = 0,
    num_models: sim.NumModels = 8,
    rate: sim.Rate = 4.0,
    duration: sim.Duration = 600.0,
    alpha: sim.Alpha = 2.1,
    cv: sim.Cv = 1.0,
    on: sim.On = 0.0,
    off: sim.Off = 0.0,
    prompt: sim.Prompt = 300.0,
    answer: sim.Answer = 120.0,
    spread: sim.Spread = 1.0,
) -> None:
    """Find the fewest devices, and the placement, with which a trace meets its objectives, in each mode."""
    from prism.cli.simulate import run_plan, simulation_inputs
    from prism.sim.plan import Target

    inputs = simulation_inputs(locals())
    run_plan(inputs, mode or list(Mode), most, Target(target, target_tpot), output, plot)
