"""`prism simulate` and `prism plan`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prism.cli.sim_options import SimOptions
from prism.errors import ConfigError
from prism.fields import parse_size
from prism.modes import Mode
from prism.outputs import PLOT_ENDINGS, check_output
from prism.sim.cluster import Cluster
from prism.sim.collecting import collect_rarely
from prism.sim.generate import Synthetic
from prism.sim.inputs import (
    Inputs,
    default_placement,
    make_cluster,
    open_profile,
    read_placement,
    read_workload,
)
from prism.sim.plan import Plan, Planner, Target, Trial, steps
from prism.sim.plots import need_matplotlib, plot_attainment, plot_models
from prism.sim.processes import num_cores
from prism.sim.report import report
from prism.sim.searches import Search, carry_out
from prism.sim.trace import TraceRow, write_trace


def _progress() -> Progress:
    """On a terminal only, and never where results go."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def simulation_inputs(options: SimOptions, is_stepping: bool = False) -> Inputs:
    """From the options that both commands have. Their minima let infinity through."""
    endless = [
        name for name, value in asdict(options).items() if isinstance(value, float) and not isfinite(value)
    ]
    if endless:
        raise ConfigError([f"--{name.replace('_', '-')} must be finite" for name in endless])
    synthetic = Synthetic(
        models=options.num_models,
        rate=options.rate,
        duration=options.duration,
        alpha=options.alpha,
        cv=options.cv,
        on=options.on,
        off=options.off,
        prompt=options.prompt,
        output=options.answer,
        spread=options.spread,
    )
    return Inputs(
        trace=options.trace,
        synthetic=synthetic,
        models=options.models,
        profile=options.profile,
        config=options.config,
        memory=_size(options.memory),
        lanes=options.lanes,
        rate_scale=options.rate_scale,
        slo_scale=options.slo_scale,
        seed=options.seed,
        is_stepping=is_stepping,
    )


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError([f"--memory: {error}"]) from None
    if not isinstance(size, int):
        raise ConfigError([f"--memory: {text!r} is no size; write 72GiB, say"])
    return size


def run_simulate(
    inputs: Inputs,
    mode: Mode,
    devices: int,
    placement: Path | None,
    output: Path | None,
    plot: Path | None,
    save_trace: Path | None,
    is_expected: bool = False,
    warm_up: float = 0.0,
) -> None:
    """One mode, on a given placement or under the controller."""
    if is_expected and (mode is not Mode.PRISM or placement is not None):
        raise ConfigError(
            ["--expected-load is for mode prism without --placement: nothing else moves by load"]
        )
    _check_outputs(output, plot)
    if save_trace is not None:
        check_output("--save-trace", save_trace)
    profile = open_profile(inputs.profile)
    load = read_workload(inputs, profile)
    if not any(row.arrival >= warm_up for row in load.requests):
        raise ConfigError([f"--warm-up {warm_up:g}: no request comes as late as that"])
    if save_trace is not None:
        _save_rows(load.requests, save_trace)
    cluster = make_cluster(inputs, load, profile, mode)
    collect_rarely()
    with _progress() as progress:
        task = progress.add_task(mode.value, total=len(load.requests))
        tell = partial(progress.advance, task)
        result = _run(cluster, devices, placement, is_expected, warm_up, tell)
    _write(result, output)
    if plot is not None:
        plot_models(result, plot)


def _run(
    cluster: Cluster,
    devices: int,
    placement: Path | None,
    is_expected: bool,
    warm_up: float,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """On a fixed placement, or under the controller where the mode has one."""
    if placement is None and cluster.setup.mode is Mode.PRISM:
        run = cluster.run_controlled(devices, is_expected, progress)
        return report(cluster.load, run.placement, cluster.setup, run.results, run.done, warm_up)
    if placement is None:
        placed = default_placement(cluster, devices)
    else:
        placed = read_placement(placement, cluster, devices)
    results = cluster.run(placed, num_cores(), progress)
    return report(cluster.load, placed, cluster.setup, results, warm_up=warm_up)


def _check_outputs(output: Path | None, plot: Path | None) -> None:
    """Before anything runs."""
    if output is not None:
        check_output("--output", output)
    if plot is not None:
        check_output("--plot", plot, PLOT_ENDINGS)
        need_matplotlib()


def _save_rows(rows: Sequence[TraceRow], path: Path) -> None:
    try:
        write_trace(rows, path)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error}"]) from None


def run_plan(
    inputs: Inputs,
    modes: Sequence[Mode],
    most: int,
    target: Target,
    output: Path | None,
    plot: Path | None,
) -> None:
    """The fewest devices for each mode."""
    _check_outputs(output, plot)
    profile = open_profile(inputs.profile)
    load = read_workload(inputs, profile)
    collect_rarely()
    searches = {
        mode: Search(Planner(make_cluster(inputs, load, profile, mode), target), steps(target, most))
        for mode in modes
    }
    with _progress() as progress:
        tasks = {mode: progress.add_task(mode.value, total=None) for mode in modes}

        def tell(mode: Mode, devices: int, trial: Trial) -> None:
            shares = f"TTFT {trial.ttft:.1%}, TPOT {trial.tpot:.1%}, both {trial.both:.1%}"
            text = f"{mode}: {devices} devices, {shares}"
            progress.update(tasks[mode], advance=1, description=text)

        plans = carry_out(searches, num_cores(), tell)
    _write({mode.value: plan_values(plan) for mode, plan in plans.items()}, output)
    _print_plans(plans, target)
    if plot is not None:
        curves = {
            mode.value: [(float(n), trial.ttft, trial.tpot) for n, trial in plan.trials.items()]
            for mode, plan in plans.items()
        }
        plot_attainment(curves, "devices", plot)


def plan_values(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    chosen = plan.chosen
    return {
        "devices": plan.num_devices,
        "ttft_attainment": chosen.ttft,
        "tpot_attainment": chosen.tpot,
        "attainment": chosen.both,
        "placement": [list(models) for models in chosen.placement.devices],
        "unplaced": list(chosen.placement.unplaced),
        "is_controlled": chosen.is_controlled,
        "tried": [
            {
                "devices": n,
                "ttft_attainment": trial.ttft,
                "tpot_attainment": trial.tpot,
                "attainment": trial.both,
            }
            for n, trial in sorted(plan.trials.items())
        ],
    }


def _print_plans(plans: dict[Mode, Plan], target: Target) -> None:
    table = Table(title=f"TTFT {target.ttft:.1%}, TPOT {target.tpot:.1%}", box=None, pad_edge=False)
    for name in ("MODE", "DEVICES", "TTFT", "TPOT", "BOTH"):
        table.add_column(name, justify="left" if name == "MODE" else "right")
    for mode, plan in plans.items():
        trial = plan.chosen
        devices = str(plan.num_devices) if plan.num_devices is not None else f"> {max(plan.trials)}"
        table.add_row(mode.value, devices, f"{trial.ttft:.2%}", f"{trial.tpot:.2%}", f"{trial.both:.2%}")
    Console(stderr=True).print(table)


def _write(values: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(values, indent=1)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n")
    except OSError as error:
        raise ConfigError([f"{output}: cannot be written: {error}"]) from None
