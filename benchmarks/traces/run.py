"""Attainment of the four modes over load and over devices, simulated on a trace.

Usage: scripts/bench traces --trace trace.csv [--devices 2] [--scales 0.5,1,2] [--most 8]
                            [--modes prism,elastic] [--processes 2] [--output DIR]
Each mode has the best placement that `prism plan` finds for it; mode prism also the controller that moves
models. Columns of a trace: arrival_s, model_key, prompt_tokens, output_tokens. Writes NAME.json and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from prism.modes import Mode
from prism.sim.generate import Synthetic
from prism.sim.inputs import Inputs, make_cluster, open_profile, read_workload
from prism.sim.plan import Planner, Target, Trial, steps
from prism.sim.plots import plot_attainment
from prism.sim.processes import num_cores
from prism.sim.searches import Search, carry_out


def planner(options: argparse.Namespace, mode: Mode, scale: float, target: float) -> Planner:
    """For one mode at one load."""
    inputs = Inputs(
        trace=options.trace,
        synthetic=Synthetic(),
        models=None,
        profile=options.profile,
        config=None,
        memory=None,
        lanes=None,
        rate_scale=scale,
        slo_scale=options.slo_scale,
        seed=0,
    )
    profile = open_profile(options.profile)
    cluster = make_cluster(inputs, read_workload(inputs, profile), profile, mode)
    return Planner(cluster, Target(target, target))


def values(trial: Trial) -> dict[str, Any]:
    """A trial as JSON."""
    return {
        "ttft": trial.ttft,
        "tpot": trial.tpot,
        "both": trial.both,
        "is_controlled": trial.is_controlled,
    }


def modes(options: argparse.Namespace) -> list[Mode]:
    """Those asked for."""
    return [Mode(name) for name in options.modes.split(",")]


def over_load(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """At `--devices` devices."""
    scales = [float(scale) for scale in options.scales.split(",") if scale]
    searches = {
        (scale, mode): Search(planner(options, mode, scale, options.target), once(options.devices))
        for scale in scales
        for mode in modes(options)
    }
    begin = time.monotonic()

    def tell(key: tuple[float, Mode], devices: int, trial: Trial) -> None:
        scale, mode = key
        print(
            f"load x {scale:<5g} {mode:9} TTFT {trial.ttft:.3f} TPOT {trial.tpot:.3f} both {trial.both:.3f}"
            f" after {time.monotonic() - begin:.0f} s",
            flush=True,
        )

    result: dict[str, dict[str, Any]] = {}
    for (scale, mode), trial in carry_out(searches, options.processes, tell).items():
        result.setdefault(mode.value, {})[f"{scale:g}"] = values(trial)
    return result


def once(devices: int) -> Generator[int, Trial, Trial]:
    """Tries one number of devices."""
    return (yield devices)


def over_devices(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """At the trace's own load."""
    target = Target(options.target, options.target)
    searches = {
        mode: Search(planner(options, mode, 1.0, options.target), steps(target, options.most))
        for mode in modes(options)
    }
    result: dict[str, dict[str, Any]] = {}
    for mode, plan in carry_out(searches, options.processes, tell_devices).items():
        tried = {str(n): values(trial) for n, trial in sorted(plan.trials.items())}
        result[mode.value] = {"fewest": plan.num_devices, "tried": tried}
        print(
            f"devices for {options.target:.0%}: {mode:9} {plan.num_devices or f'> {options.most}'}",
            flush=True,
        )
    return result


def tell_devices(mode: Mode, devices: int, trial: Trial) -> None:
    """Prints each number of devices that was tried."""
    print(f"{devices} devices {mode:9} {trial.ttft:.3f} {trial.tpot:.3f}", flush=True)


def main() -> None:
    """Prints one line a point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--scales", default="0.25,0.5,1,2,4", help="loads; none with an empty text")
    parser.add_argument("--most", type=int, default=8)
    parser.add_argument("--modes", default=",".join(Mode))
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--slo-scale", type=float, default=5.0)
    parser.add_argument("--profile", default="h100")
    parser.add_argument("--processes", type=int, default=num_cores())
    parser.add_argument("--output", type=Path, help="folder")
    options = parser.parse_args()
    loads = over_load(options)
    devices = over_devices(options) if options.most else {}
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        target = options.output / f"{options.trace.stem}.json"
        shown = {
            key: str(value)
            for key, value in vars(options).items()
            if key not in ("trace", "output", "processes")
        }
        target.write_text(json.dumps({"options": shown, "load": loads, "devices": devices}, indent=1) + "\n")
        curves = {
            mode: [(float(scale), point["ttft"], point["tpot"]) for scale, point in points.items()]
            for mode, points in loads.items()
        }
        if curves:
            plot_attainment(curves, "times the trace's load", target.with_suffix(".png"))


if __name__ == "__main__":
    main()
