"""Activations through the whole server on one NVIDIA GPU: ten models in host memory, few on the device.

Usage: scripts/bench activation [--memory 21GiB] [--output results.json] [--rehearse]
Two 8B shapes, of which the device holds one at a time, and eight 1B shapes; all weights are random. Then
a second server, whose device holds two of the 1B shapes at a time. Prompts have 512 tokens. Times are a
client's, from sending the request to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from client import stream
from running import gpu_name, is_healthy, running
from shapes import write_shape

from prism.configfile import load_config
from prism.types import Bytes
from prism.worker.models import read_profile

PORT, ADMIN = 8360, 8361
Measured = Callable[[httpx.AsyncClient, int], Awaitable[dict[str, Any]]]
FOR_TWO_SMALL = "5300MiB"
"""Of device memory: weights of two 1B shapes, workspaces, and a little KV."""
LARGE = ("8b-0", "8b-1")
SMALL = tuple(f"1b-{i}" for i in range(8))


def config(folder: Path, memory: str, *, is_rehearsal: bool, has_large: bool = True) -> Path:
    """All models, or the small ones, none loaded at the start; rehearsals have only those asked for."""
    large, small = ("rehearsal",) * 2 if is_rehearsal else ("llama-3-8b", "llama-3.2-1b")
    for name in {large, small}:
        write_shape(name, folder)
    shapes = dict.fromkeys(SMALL[:4] if is_rehearsal else SMALL, small)
    if has_large:
        shapes = dict.fromkeys(LARGE, large) | shapes
    models = [
        {"name": name, "path": str(folder / shape), "load_format": "dummy"} for name, shape in shapes.items()
    ]
    path = folder / "prism.yaml"
    device: dict[str, Any] = {"kind": "cpu", "threads": 1} if is_rehearsal else {"kind": "cuda"}
    settings = {
        "models": models,
        "devices": [device | {"memory": memory, "slab": "32MiB"}],
        "server": {"port": PORT, "admin_port": ADMIN},
        "limits": {"max_wait": 300},
        "host_memory": {"budget": "64GiB"},
    }
    path.write_text(json.dumps(settings))
    return path


def registered_bytes() -> int:
    """Of all models together."""
    devices = httpx.get(f"http://127.0.0.1:{ADMIN}/admin/models").json()["devices"]
    return sum(device["registered_bytes"] for device in devices)


async def unload(name: str) -> None:
    """Take a model off the device."""
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"http://127.0.0.1:{ADMIN}/admin/models/{name}/unload")
        answer.raise_for_status()


async def measure(client: httpx.AsyncClient, runs: int) -> dict[str, Any]:
    """All figures; the first activation of each shape compiles kernels and is told apart."""
    result: dict[str, Any] = {}

    async def first(model: str, seed: int) -> float:
        return (await stream(client, model, 512, 2, seed))["ttft"]

    result["8b_first_ever_s"] = await first(LARGE[0], 0)
    result["1b_first_ever_s"] = await first(SMALL[0], 0)
    for name in (LARGE[1], *SMALL[1:3]):
        await first(name, 1)
    swaps = [await first(LARGE[turn % 2], 10 + turn) for turn in range(runs)]
    result["8b_while_another_8b_leaves_s"] = _spread(swaps)
    times = []
    for turn in range(runs):
        await unload(SMALL[1])
        times.append(await first(SMALL[1], 30 + turn))
    result["1b_evicted_s"] = _spread(times)
    warm = [await first(LARGE[(runs - 1) % 2], 50 + turn) for turn in range(5)]
    result["8b_loaded_s"] = _spread(warm)
    result["1b_loaded_s"] = _spread([await first(SMALL[1], 60 + turn) for turn in range(5)])
    for name in (*LARGE, *SMALL[:4]):
        await unload(name)
    together = await asyncio.gather(*(first(name, 80) for name in SMALL[:4]))
    result["four_1b_at_once_s"] = _spread(list(together))
    return result


def _spread(times: list[float]) -> dict[str, Any]:
    """Median, least and worst, in seconds."""
    return {
        "median": round(statistics.median(times), 4),
        "least": round(min(times), 4),
        "worst": round(max(times), 4),
        "runs": len(times),
    }


async def measure_small(client: httpx.AsyncClient, runs: int) -> dict[str, Any]:
    """1B shapes in turn, more than the device holds: each makes room for the next."""
    models = SMALL[:4]
    for model in models:
        await stream(client, model, 512, 2, 0)
    before = evictions()
    times = [(await stream(client, models[turn % 4], 512, 2, 10 + turn))["ttft"] for turn in range(runs)]
    return {
        "1b_while_another_1b_leaves_s": _spread(times),
        "evictions_for_that": evictions() - before,
    }


def evictions() -> int:
    """Of all models so far."""
    text = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    return sum(int(float(n)) for n in re.findall(r"prism:evictions_total\{[^}]*\} ([0-9.]+)", text))


async def with_client(measured: Measured, runs: int) -> dict[str, Any]:
    """`measure` or `measure_small` with a client of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", limits=limits) as client:
        return await measured(client, runs)


def link_bandwidth() -> float:
    """Bytes a second of plain copies of 2 GiB of pinned memory to the device, the best of five."""
    import torch

    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return source.numel() / min(times)


def weights_bytes(path: Path) -> int:
    """Of all models of a configuration together."""
    config = load_config(path)
    slab = Bytes(config.devices[0].slab)
    return sum(read_profile(model, slab).weights.total_bytes for model in config.models)


def with_server(
    path: Path, log: Path, measured: Measured, runs: int, *, has_registered: bool
) -> dict[str, Any]:
    """Start, wait until all weights are registered if any ever are, measure, stop."""
    with running(path, log) as server:
        healthy = server.wait_for(lambda: is_healthy(PORT), 120)
        result: dict[str, Any] = {"start_to_healthy_s": healthy}
        if has_registered:
            total = weights_bytes(path)
            seconds = server.wait_for(lambda: registered_bytes() >= total, 240)
            result["healthy_to_all_registered_s"] = seconds - healthy
            result["registered_gb"] = registered_bytes() / 1e9
        return result | asyncio.run(with_client(measured, runs))


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="21GiB")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: tests this script")
    options = parser.parse_args()
    is_rehearsal = options.rehearse
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        path = config(folder, options.memory, is_rehearsal=is_rehearsal)
        result = with_server(path, log, measure, options.runs, has_registered=not is_rehearsal)
        kept = (" active after ", " is up", " is packed")
        lines = [line for line in log.read_text().splitlines() if any(text in line for text in kept)]
        result = {"gpu": gpu_name()} | result
        result["log"] = lines[:14] + lines[-14:]
        print(json.dumps(result), file=sys.stderr, flush=True)  # should the second server fail
        path = config(folder, FOR_TWO_SMALL, is_rehearsal=is_rehearsal, has_large=False)
        small = with_server(path, log, measure_small, 2 * options.runs, has_registered=not is_rehearsal)
        result |= {key: value for key, value in small.items() if key not in result}
        if not is_rehearsal:
            result["link_gb_per_s"] = round(link_bandwidth() / 1e9, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
