"""Eight models under memory that cannot hold them all, in each mode: measured, then predicted by the
simulator.

Usage: scripts/bench sharing [--memory 30GiB] [--rate 6] [--duration 30] [--output results.json] [--rehearse]
Two 8B and six 1B shapes with random weights. The same made trace goes to a server in each mode through `prism
bench`; objectives are each model's P95 alone (`prism bench --baseline`) times a scale. With --profile the
same trace goes through `prism simulate`.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from shapes import write_shape

PORT, ADMIN = 8370, 8371
SHAPES = {"8b": "llama-3-8b", "1b": "llama-3.2-1b"}
ORDER = ("1b", "8b", "1b", "1b", "8b", "1b", "1b", "1b")
"""By popularity."""
PRISM = [sys.executable, "-c", "from prism.cli.main import main; main()"]


def models(is_rehearsal: bool) -> dict[str, str]:
    """Served names, as the generator calls them, with their shapes."""
    shape = (lambda _: "rehearsal") if is_rehearsal else SHAPES.__getitem__
    return {f"m{i:02}": shape(size) for i, size in enumerate(ORDER)}


def write_config(folder: Path, options: argparse.Namespace, mode: str) -> Path:
    """A server's configuration."""
    shapes = models(options.rehearse)
    for shape in set(shapes.values()):
        write_shape(shape, folder)
    settings: dict[str, Any] = {
        "models": [
            {"name": name, "path": str(folder / shape), "load_format": "dummy"}
            for name, shape in shapes.items()
        ],
        "devices": [{"kind": "cpu" if options.rehearse else "cuda", "memory": options.memory}],
        "server": {"port": PORT, "admin_port": ADMIN},
        "host_memory": {"budget": "60GiB"},
        "scheduling": {"mode": mode},
    }
    if options.profile is not None:
        settings["scheduling"]["profile"] = str(options.profile.resolve())
    path = folder / f"{mode}.yaml"
    path.write_text(json.dumps(settings))
    return path


@contextmanager
def server(config: Path, log: Path) -> Iterator[None]:
    """Up, with all weights packed."""
    process = subprocess.Popen([*PRISM, "serve", str(config)], stderr=log.open("ab"))
    try:
        end = time.monotonic() + 150
        while time.monotonic() < end and process.poll() is None:
            if log.read_text().count(" is packed") >= len(ORDER) and _is_healthy():
                break
            time.sleep(0.1)
        else:
            raise SystemExit(f"the server does not get that far:\n{log.read_text()[-3000:]}")
        time.sleep(3.0)  # host memory is registered meanwhile
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _is_healthy() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200
    except httpx.HTTPError:
        return False


def bench(folder: Path, *arguments: str) -> None:
    """`prism bench` with the trace."""
    command = [*PRISM, "bench", "--models", str(folder / "models.json"), "--dataset-name", "trace"]
    command += ["--dataset-path", str(folder / "trace.csv"), "--base-url", f"http://127.0.0.1:{PORT}"]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)


def make_trace(folder: Path, options: argparse.Namespace) -> None:
    """The requests of all modes, and who answers them."""
    command = [*PRISM, "simulate", "--devices", "1", "--num-models", str(len(ORDER))]
    command += ["--rate", str(options.rate), "--duration", str(options.duration), "--alpha", "2.1"]
    command += ["--cv", "2", "--on", "8", "--off", "8", "--seed", str(options.seed)]
    command += ["--save-trace", str(folder / "trace.csv"), "--output", str(folder / "made.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    served = {name: {"model": name} for name in models(options.rehearse)}
    (folder / "models.json").write_text(json.dumps(served))


def predicted(folder: Path, options: argparse.Namespace, mode: str, alone: dict[str, Any]) -> dict[str, Any]:
    """What the simulator says of the same trace, with the measured objectives."""
    entries = {}
    for name, shape in models(options.rehearse).items():
        slo = alone["models"][name]
        scale = options.slo_scale / 1e3
        entries[name] = {"shape": shape, "ttft": slo["ttft_ms"] * scale, "tpot": slo["tpot_ms"] * scale}
    (folder / "shapes.json").write_text(json.dumps(entries))
    command = [*PRISM, "simulate", "--trace", str(folder / "trace.csv"), "--devices", "1", "--mode", mode]
    command += ["--models", str(folder / "shapes.json"), "--profile", str(options.profile)]
    command += ["--memory", options.memory, "--output", str(folder / "predicted.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((folder / "predicted.json").read_text())
    return {key: result[key] for key in ("ttft_attainment", "tpot_attainment", "goodput")}


def main() -> None:
    """Prints one line a mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="30GiB")
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--duration", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slo-scale", type=float, default=5.0)
    parser.add_argument("--modes", default="prism,elastic,static,timeshare")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: tests this script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_trace(folder, options)
        result: dict[str, Any] = {"command": sys.argv[1:], "modes": {}}
        alone = folder / "alone.json"
        for mode in options.modes.split(","):
            log = folder / f"{mode}.log"
            with server(write_config(folder, options, mode), log):
                if not alone.exists():
                    bench(folder, "--baseline", str(alone), "--baseline-requests", "6")
                    result["alone"] = json.loads(alone.read_text())
                saved = ["--save-result", "--result-dir", name, "--result-filename", f"{mode}.json"]
                scale = ["--slo-from", str(alone), "--slo-scale", str(options.slo_scale)]
                bench(folder, *scale, *saved)
            found = json.loads((folder / f"{mode}.json").read_text())
            found["log"] = [x for x in log.read_text().splitlines() if "evicted" in x or "active" in x][-6:]
            result["modes"][mode] = {"measured": found}
            if options.profile is not None:
                result["modes"][mode]["predicted"] = predicted(folder, options, mode, result["alone"])
            print(mode, json.dumps({k: v for k, v in found.items() if "attain" in k or "goodput" in k}))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
