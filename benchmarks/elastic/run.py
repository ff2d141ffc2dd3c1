"""Throughput with slabs that change their owner all the time, against KV that is fixed beforehand.

Usage: scripts/bench elastic [--shape 1b] [--turns 8] [--output results.json] [--rehearse]
Two models take turns in bursts of distinct prompts. `fixed`: each has its own share of KV, floor and limit at
once, and so twice the memory. `elastic`: one share between both, which changes its owner in every turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from bench_worker import BenchWorker
from shapes import write_shape

from prism.types import Bytes, MiB
from prism.worker.models import read_profile

SLAB = Bytes(32 * MiB)
SHAPES = {"1b": "llama-3.2-1b", "8b": "llama-3-8b", "tiny": "rehearsal"}


def prompt(seed: int, length: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128000, (length,), generator=generator).tolist()


class Load:
    """What a turn is made of."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        self.count, self.inputs, self.outputs = count, inputs, outputs


def measure(shape: str, load: Load, turns: int, kind: str, *, is_fixed: bool) -> dict[str, Any]:
    """Output tokens a second of each turn, and how many slabs changed their owner."""
    with tempfile.TemporaryDirectory() as name:
        path = write_shape(SHAPES[shape], Path(name))
        config = {"path": str(path)}
        bench = None
        share, weights = _sizes(path, load)
        bounds = {"memory": {"floor": share * SLAB, "limit": share * SLAB}} if is_fixed else {}
        slabs = 2 * weights + (2 if is_fixed else 1) * share + WORKSPACES
        device = {"kind": kind, "memory": slabs * SLAB, "slab": SLAB, "lanes": 1}
        models = [{"name": n, "pinned": True} | config | bounds for n in ("a", "b")]
        bench = BenchWorker(models, device)
        for turn, model in enumerate(("a", "b")):
            bench.submit(f"warm{turn}", model, prompt(turn, 600), load.outputs)
        bench.run()
        for turn in range(2):  # every block has been in use, and all graphs are there
            _burst(bench, f"first{turn}", "ab"[turn], load, _prompts(load, 10_000 + turn))
        prompts = [_prompts(load, turn) for turn in range(turns)]
        moved, held = 0, _held(bench)
        rates = []
        for turn in range(turns):
            begin = time.perf_counter()
            _burst(bench, str(turn), "ab"[turn % 2], load, prompts[turn])
            rates.append(load.count * load.outputs / (time.perf_counter() - begin))
            now = _held(bench)
            moved += sum(max(0, now[m] - held[m]) for m in now)
            held = now
        bench.close()
        return {"tok_s": [round(rate, 1) for rate in rates], "slabs_moved": moved, "share_slabs": share}


WORKSPACES = 24
"""Slabs for the lane's own buffers, more than it takes."""


def _sizes(path: Path, load: Load) -> tuple[int, int]:
    """Slabs of KV that a turn fills, and slabs of weights."""
    from prism.config import ModelConfig

    profile = read_profile(ModelConfig(name="x", path=str(path), load_format="dummy"), SLAB)
    blocks = load.count * profile.kv.num_blocks(load.inputs + load.outputs)
    return -(-blocks // profile.kv.blocks_per_slab) + 2, profile.weight_slabs


def _held(bench: BenchWorker) -> dict[str, int]:
    """Slabs of KV by model."""
    models = bench.worker.models.values()
    return {m.name: 0 if m.kv is None else m.kv.num_slabs for m in models}


def _prompts(load: Load, seed: int) -> list[list[int]]:
    return [prompt(seed * 1000 + i, load.inputs) for i in range(load.count)]


def _burst(bench: BenchWorker, name: str, model: str, load: Load, prompts: list[list[int]]) -> None:
    for i, tokens in enumerate(prompts):
        bench.submit(f"{name}.{i}", model, tokens, load.outputs)
    bench.run()


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: tests this script")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    shape, kind, load = options.shape, "cuda", Load(64, 1000, 128)
    if options.rehearse:
        shape, kind, load = "tiny", "cpu", Load(4, 40, 4)
    runs: dict[str, list[dict[str, Any]]] = {"fixed": [], "elastic": []}
    for _ in range(options.repeats):
        for name, found in runs.items():
            found.append(measure(shape, load, options.turns, kind, is_fixed=name == "fixed"))
    middle = {
        name: statistics.median(rate for run in found for rate in run["tok_s"])
        for name, found in runs.items()
    }
    result = {
        "gpu": torch.cuda.get_device_name() if kind == "cuda" else "none (rehearsal)",
        "shape": shape,
        "requests_a_turn": load.count,
        "tokens": [load.inputs, load.outputs],
        "turns": options.turns,
        **runs,
        "median_tok_s": middle,
        "elastic_over_fixed": round(middle["elastic"] / middle["fixed"], 4),
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
