"""Models under memory that cannot hold them all, in each mode: measured, and predicted by the simulator.

Usage: scripts/bench sharing [--setup h200|cpu] [--rate 0.4] [--speed 15] [--output results.json]
Setups: `h200`, two 8B and six 1B shapes on 30 GiB; `cpu`, two models of 110 million and two of 30 million
parameters on 448 MiB and one thread. Weights are random. `prism profile` measures the device. A made trace of
ten minutes, with bursts and pauses of two, goes at 15 times its speed to a server in each mode through
`prism bench`, whose objectives are each model's P95 alone times a scale, and through `prism simulate` with
the same configuration.

A server sees the trace twice, and the second pass counts. Between the two, `prism profile --from-server`
learns from it what steps and loads that were alone took; predictions use these costs. Requests come at the
same times in both passes, with other prompts that are as long. No prediction knows what steps of the second
one take; `hindsight` tells what would have been predicted with that.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from running import is_healthy, running
from shapes import CONTEXT, write_shape

from prism.calibration.learnt import added, read_counts
from prism.calibration.learnt import learn as learn_costs
from prism.profile import read_profile, write_profile

PRISM = [sys.executable, "-c", "from prism.cli.main import main; main()"]
PAUSE = 5.0
"""Seconds between the end of one run of requests and the next, about what a client takes to end and begin."""
FIGURES = ("ttft_attainment", "tpot_attainment", "attainment")


@dataclass(frozen=True, slots=True)
class Setup:
    """Shapes by popularity, and what they share."""

    shapes: tuple[str, ...]
    device: dict[str, Any]
    trace: dict[str, float]
    """Options of `prism simulate` that make it."""
    port: int
    """Of the server; the next one is its admin port."""

    @property
    def models(self) -> dict[str, str]:
        """Served names, as the generator calls them, with their shapes."""
        return {f"m{i:02}": shape for i, shape in enumerate(self.shapes)}


BIG, SMALL = "llama-3-8b", "llama-3.2-1b"
SETUPS = {
    "h200": Setup(
        (SMALL, BIG, SMALL, SMALL, BIG, SMALL, SMALL, SMALL),
        {"kind": "cuda", "memory": "30GiB"},
        {"rate": 0.4, "alpha": 2.1, "cv": 2.0, "on": 120.0, "off": 120.0, "prompt": 300.0, "answer": 120.0},
        8370,
    ),
    "cpu": Setup(
        ("cpu-30m", "cpu-110m", "cpu-110m", "cpu-30m"),
        {"kind": "cpu", "memory": "448MiB", "slab": "2MiB", "threads": 1},
        {"rate": 0.2, "alpha": 3.0, "cv": 2.0, "on": 120.0, "off": 120.0, "prompt": 60.0, "answer": 20.0},
        8380,
    ),
}


def write_config(
    folder: Path,
    setup: Setup,
    mode: str,
    names: Iterable[str],
    loads: dict[str, float],
    slos: dict[str, dict[str, float]],
) -> Path:
    """A server's configuration with the models in this order, their loads and objectives as far as known."""
    for shape in set(setup.shapes):
        write_shape(shape, folder)
    profile = folder / "profile.json"
    settings: dict[str, Any] = {
        "models": [
            {
                "name": name,
                "path": str(folder / setup.models[name]),
                "load_format": "dummy",
                "expected_load": loads.get(name),
                **({"slo": slos[name]} if name in slos else {}),
            }
            for name in names
        ],
        "devices": [setup.device],
        "server": {"port": setup.port, "admin_port": setup.port + 1},
        "host_memory": {"budget": "60GiB" if setup.device["kind"] == "cuda" else "2GiB"},
        "scheduling": {"mode": mode, "profile": str(profile) if profile.exists() else None},
    }
    path = folder / f"{mode}.yaml"
    path.write_text(json.dumps(settings))
    return path


@contextmanager
def server(config: Path, log: Path, setup: Setup) -> Iterator[None]:
    """Up, with all weights packed."""

    def has_packed() -> bool:
        return log.read_text().count(" is packed") >= len(setup.shapes)

    with running(config, log) as started:
        started.wait_for(lambda: has_packed() and is_healthy(setup.port), 150)
        _await_registration(setup.port + 1)
        yield


def _await_registration(admin: int) -> None:
    """Until no more host memory is registered, which takes time from steps: for two seconds, or a minute."""
    seen = list[int]()
    while len(seen) < 60 and (len(seen) < 3 or len(set(seen[-3:])) > 1):
        devices = httpx.get(f"http://127.0.0.1:{admin}/admin/models").json()["devices"]
        seen.append(sum(device["registered_bytes"] for device in devices))
        time.sleep(1.0)


def prism(*arguments: str) -> None:
    """A command whose results are in files."""
    subprocess.run([*PRISM, *arguments], check=True, stdout=subprocess.DEVNULL)


def bench(folder: Path, port: int, *arguments: str, trace: str = "trace.csv") -> None:
    """`prism bench` with a trace."""
    traffic = ["--models", str(folder / "models.json"), "--dataset-name", "trace"]
    traffic += ["--dataset-path", str(folder / trace), "--base-url", f"http://127.0.0.1:{port}"]
    prism("bench", *traffic, *arguments)


def make_trace(folder: Path, setup: Setup, options: argparse.Namespace) -> None:
    """The requests of all modes, in seconds as they are sent, and who answers them."""
    trace = setup.trace | ({} if options.rate is None else {"rate": options.rate})
    made = [f"--{name}={value}" for name, value in trace.items()]
    made += [f"--num-models={len(setup.shapes)}", f"--duration={options.duration}", f"--seed={options.seed}"]
    saved = ["--save-trace", str(folder / "made.csv"), "--output", str(folder / "made.json")]
    prism("simulate", "--devices", "1", *made, *saved)
    head, *rows = (folder / "made.csv").read_text().splitlines()
    parts = [row.split(",", 1) for row in rows]
    sent = [f"{float(arrival) / options.speed:.6f},{rest}" for arrival, rest in parts]
    (folder / "trace.csv").write_text("\n".join((head, *sent)) + "\n")
    (folder / "models.json").write_text(json.dumps({name: {"model": name} for name in setup.models}))


def measure_alone(folder: Path, setup: Setup, alone: Path) -> None:
    """Each model's P95s on a server that has nothing else to do; a mode that has room for each.

    The second time counts: with few requests a P95 is the worst of them, and at first that is one whose step
    had no graph yet. The first time prompts are others, or prefix caches would answer.
    """
    config = write_config(folder, setup, "timeshare", setup.models, {}, {})
    with server(config, folder / "alone.log", setup):
        for seed in ("1", "0"):
            given = ["--baseline", str(alone), "--baseline-requests", "8", "--seed", seed]
            bench(folder, setup.port, *given)


def objectives(alone: Path, scale: float) -> dict[str, dict[str, float]]:
    """Of each model: its P95s alone times the scale. Servers are told, the trace is judged by them."""
    models = json.loads(alone.read_text())["models"]
    return {
        name: {"ttft": entry["ttft"] * scale, "tpot": entry["tpot"] * scale} for name, entry in models.items()
    }


def learnt_of(folder: Path, mode: str) -> Path:
    """The profile with costs as the mode's server measured them before the pass that counts."""
    return folder / f"learnt-{mode}.json"


def learn(folder: Path, mode: str, setup: Setup) -> None:
    """Write it, from all that has run on the server until now."""
    given = ["--from-server", f"http://127.0.0.1:{setup.port}", "--profile", str(folder / "profile.json")]
    prism("profile", *given, "--output", str(learnt_of(folder, mode)))


def hindsight_of(folder: Path, mode: str) -> Path:
    """The same with costs as they were in the pass that counts, which no prediction could know."""
    return folder / f"hindsight-{mode}.json"


def write_hindsight(folder: Path, mode: str, before: str, after: str) -> None:
    """From the server's metrics at the beginning and at the end of that pass."""
    base, name = folder / "profile.json", f"the server in mode {mode}"
    counts = added(read_counts(before, name), read_counts(after, name), name)
    learnt = learn_costs(read_profile(base), counts, base.name, name, "in the pass that counts")
    write_profile(learnt.profile, hindsight_of(folder, mode))


def measured(folder: Path, config: Path, setup: Setup, scale: float, alone: Path) -> dict[str, Any]:
    """What `prism bench` says of a server that has seen the trace before, and captured its graphs.

    While there is no graph for the size of a prompt its step takes up to ten times as long, and a server that
    runs for longer has met all sizes. The first time prompts are as long, but others: of the same ones prefix
    caches and host memory had nearly all tokens. At first everybody is asked once, in the order of the
    configuration: models are bound to lanes in the order in which they come.
    """
    mode, log = config.stem, config.with_suffix(".log")
    with server(config, log, setup):
        bench(folder, setup.port, trace="touch.csv")
        bench(folder, setup.port, "--seed", "1")
        learn(folder, mode, setup)
        before = metrics_of(setup)
        saved = ["--save-result", "--result-dir", str(folder), "--result-filename", f"{mode}.json"]
        bench(folder, setup.port, "--slo-from", str(alone), "--slo-scale", str(scale), *saved)
        after = metrics_of(setup)
    write_hindsight(folder, mode, before, after)
    result: dict[str, Any] = json.loads((folder / f"{mode}.json").read_text())
    steps = steps_of(after)
    return result | {"steps": steps, "pace": pace_of(steps_of(before), steps)}


def metrics_of(setup: Setup) -> str:
    """All that the server has counted, some half a second ago."""
    return httpx.get(f"http://127.0.0.1:{setup.port}/metrics").text


def steps_of(metrics: str) -> dict[str, dict[str, float]]:
    """Sums over models of steps, and of work alone, by kind; seconds as they were, and by the profile."""
    sums: dict[str, dict[str, float]] = {}
    pattern = r'^prism:((?:step|work)\w*)_total\{(?:costs="\w+",)?kind="(\w+)",.*\} (\S+)$'
    for name, kind, value in re.findall(pattern, metrics, re.MULTILINE):
        figures = sums.setdefault(kind, {})
        figures[name] = figures.get(name, 0.0) + float(value)
    return sums


def pace_of(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, float]:
    """By kind, how many times what it took in the pass before work alone took in the one that counts.

    Far from 1 the machine had another pace, which no prediction could know.
    """
    taken, said = "work_alone_seconds", "work_alone_predicted_seconds"
    return {
        kind: (after[kind][taken] - old[taken]) / (after[kind][said] - old[said]) / (old[taken] / old[said])
        for kind, old in before.items()
        if old.get(said) and after[kind][said] > old[said]
    }


def predicted(
    folder: Path, config: Path, setup: Setup, scale: float, alone: Path, profile: Path
) -> dict[str, Any]:
    """What the simulator says of the same trace, with the same objectives and the costs of a profile."""
    slos = objectives(alone, scale)
    entries = {name: {"shape": name, "context": CONTEXT, **slos[name]} for name in setup.models}
    (folder / "shapes.json").write_text(json.dumps(entries))
    trace, warm_up = warm_trace(folder)
    given = ["--trace", str(trace), "--warm-up", str(warm_up), "--models", str(folder / "shapes.json")]
    given += ["--profile", str(profile), "--config", str(config)]
    output = folder / "predicted.json"
    prism("simulate", *given, "--devices", "1", "--mode", config.stem, "--output", str(output))
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def write_touches(folder: Path, names: Iterable[str]) -> None:
    """A short request of each model in this order."""
    rows = [f"{i / 20:.2f},{name},16,2" for i, name in enumerate(names)]
    head = (folder / "trace.csv").read_text().partition("\n")[0]
    (folder / "touch.csv").write_text("\n".join((head, *rows)) + "\n")


def warm_trace(folder: Path) -> tuple[Path, float]:
    """Touches and the trace twice, as servers see them, and when it begins for the second time."""
    parts, begin, seen = [], 0.0, list[str]()
    for name in ("touch.csv", "trace.csv", "trace.csv"):
        head, *lines = (folder / name).read_text().splitlines()
        rows = [line.split(",", 1) for line in lines]
        seen += [f"{begin + float(arrival):.6f},{rest}" for arrival, rest in rows]
        parts.append(begin)
        begin += float(rows[-1][0]) + PAUSE
    path = folder / "warm.csv"
    path.write_text("\n".join((head, *seen)) + "\n")
    return path, parts[-1]


def compared(real: dict[str, Any], simulated: dict[str, Any]) -> dict[str, Any]:
    """Attainments of both, and by how many points they differ: of all, and by model, weighted by requests."""
    weights = {name: model["requests"] for name, model in simulated["models"].items()}
    result: dict[str, Any] = {}
    for figure in FIGURES:
        pairs = {
            name: (_figure(real["models"][name], figure), simulated["models"][name][figure])
            for name in weights
        }
        apart = sum(weights[name] * abs(a - b) for name, (a, b) in pairs.items()) / sum(weights.values())
        total = _figure(real, figure), simulated[figure]
        result[figure] = {
            "measured": total[0],
            "predicted": total[1],
            "points": 100 * (total[1] - total[0]),
            "points_by_model": 100 * apart,
            "models": pairs,
        }
    return result


def _figure(result: dict[str, Any], name: str) -> float:
    short = {"ttft_attainment": "ttft", "tpot_attainment": "tpot", "attainment": "both"}[name]
    return float(result["attainment"][short])


def loads_of(folder: Path) -> dict[str, float]:
    """Seconds of the device that each model's requests take in the trace, by the profile."""
    costs = json.loads((folder / "profile.json").read_text())["models"]
    rows = [line.split(",") for line in (folder / "trace.csv").read_text().splitlines()[1:]]
    loads: dict[str, float] = {}
    for _, name, prompt, output in rows:
        knots = costs[name]["knots"]
        seconds = int(output) * knots[0][1] + int(prompt) * knots[-1][1] / knots[-1][0]
        loads[name] = loads.get(name, 0.0) + seconds
    return loads


def run_mode(folder: Path, setup: Setup, mode: str, scale: float) -> dict[str, Any]:
    """Both. Models are configured by demand where those that do not fit any more are refused, else by size:
    in that order they come into free memory."""
    loads = loads_of(folder)
    names = sorted(setup.models, key=lambda name: (-loads.get(name, 0.0), name))
    if mode in ("prism", "timeshare"):
        costs = json.loads((folder / "profile.json").read_text())["models"]
        names = sorted(names, key=lambda name: (costs[name]["shape"]["weight_bytes"], name))
    alone = folder / "alone.json"
    config = write_config(folder, setup, mode, names, loads, objectives(alone, scale))
    write_touches(folder, names)
    real = measured(folder, config, setup, scale, alone)
    simulated = predicted(folder, config, setup, scale, alone, learnt_of(folder, mode))
    figures = compared(real, simulated)
    known = predicted(folder, config, setup, scale, alone, hindsight_of(folder, mode))
    hindsight = compared(real, known)
    for figure, values in figures.items():
        print(mode, figure, *(f"{k} {v:.3f}" for k, v in values.items() if k != "models"), flush=True)
    for figure, values in hindsight.items():
        print(mode, "hindsight", figure, f"predicted {values['predicted']:.3f}", flush=True)
    for kind, sums in real["steps"].items():
        print(mode, kind, *(f"{name} {value:.6g}" for name, value in sums.items()), flush=True)
    print(mode, "pace", *(f"{kind} {value:.3f}" for kind, value in real["pace"].items()), flush=True)
    learnt = json.loads(learnt_of(folder, mode).read_text())
    result = {"compared": figures, "hindsight": hindsight, "learnt": learnt}
    return result | {"measured": real, "predicted": simulated}


def main() -> None:
    """Prints one line a mode and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", choices=SETUPS, default="h200")
    parser.add_argument("--rate", type=float, help="requests a second of the trace")
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of the trace")
    parser.add_argument("--speed", type=float, default=15.0, help="times that the trace is sent faster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slo-scale", type=float, default=5.0)
    parser.add_argument("--modes", default="prism,elastic,static,timeshare")
    parser.add_argument("--folder", type=Path, help="for all files; a profile and latencies alone are reused")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    setup = SETUPS[options.setup]
    with tempfile.TemporaryDirectory() as name:
        folder = (options.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_trace(folder, setup, options)
        profile = folder / "profile.json"
        if not profile.exists():
            config = write_config(folder, setup, "prism", setup.models, {}, {})
            prism("profile", str(config), "--output", str(profile))
        if not (folder / "alone.json").exists():
            measure_alone(folder, setup, folder / "alone.json")
        result: dict[str, Any] = {"command": sys.argv[1:], "modes": {}}
        result["profile"] = json.loads(profile.read_text())
        result["alone"] = json.loads((folder / "alone.json").read_text())
        for mode in options.modes.split(","):
            result["modes"][mode] = run_mode(folder, setup, mode, options.slo_scale)
            if options.output:  # of the modes so far
                options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
