"""Measures the server on one NVIDIA GPU: logits, activation, decode steps, memory handed over under load.

Usage: python benchmarks/first-light/run.py [--memory 22GiB] [--output results.json] [--rehearse]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import httpx
from client import stream
from running import gpu_name, is_healthy, running
from shapes import write_shape

HERE = Path(__file__).parent
PORT, ADMIN = 8350, 8351
CONFIG = """
models:
  - {{name: 8b, path: {large}, load_format: dummy}}
  - {{name: 1b, path: {small}, load_format: dummy}}
devices: [{{{device}, memory: {memory}, slab: 32MiB}}]
server: {{port: {port}, admin_port: {admin}}}
limits: {{max_wait: 300s}}
host_memory: {{budget: 40GiB}}
"""


def slabs() -> dict[str, int]:
    """Slabs by owner, from /metrics."""
    text = httpx.get(f"http://127.0.0.1:{PORT}/metrics").text
    found = re.findall(r'prism:slabs\{model="([^"]*)",owner="([^"]*)",worker="[^"]*"\} ([0-9.]+)', text)
    return {f"{owner} {model}".strip(): int(float(count)) for model, owner, count in found}


async def measure(client: httpx.AsyncClient, log: Path, scale: int) -> dict[str, Any]:
    """All figures. `scale` divides the lengths of answers, and of the hand-over's prompts."""
    result: dict[str, Any] = {}
    result["1b_cold_ttft_s"] = (await stream(client, "1b", 512, 2, 0))["ttft"]
    result["8b_cold_ttft_s"] = (await stream(client, "8b", 512, 2, 0))["ttft"]
    for name in ("1b", "8b"):
        for batch in (1, 8):
            runs = [stream(client, name, 1000, 128 // scale, seed) for seed in range(batch)]
            gaps = [run["gap"] for run in await asyncio.gather(*runs)]
            result[f"{name}_decode_ms_batch_{batch}"] = 1000 * statistics.median(gaps)
        result[f"{name}_ttft_512_ms"] = 1000 * min(
            [(await stream(client, name, 512, 2, 100 + i))["ttft"] for i in range(5)]
        )
    admin = f"http://127.0.0.1:{ADMIN}/admin/models"
    for name in ("1b", "8b"):
        async with httpx.AsyncClient(timeout=60) as http:
            (await http.post(f"{admin}/{name}/unload")).raise_for_status()
        result[f"{name}_evicted_to_first_token_s"] = (await stream(client, name, 512, 2, 7))["ttft"]
    result["handover"] = await handover(client, scale)
    found = re.findall(r"model (\S+) active after ([0-9.]+) s \(copy ([0-9.]+)", log.read_text())
    result["activations"] = [
        {"model": name, "wanted_to_active_s": float(total), "map_copy_verify_s": float(copy)}
        for name, total, copy in found
    ]
    return result


async def handover(client: httpx.AsyncClient, scale: int) -> dict[str, Any]:
    """1b fills the pool with its prefix cache and goes on decoding while a burst on 8b takes the slabs."""
    await asyncio.gather(*(stream(client, "1b", 4000 // scale, 2, 1000 + i) for i in range(40)))
    await asyncio.sleep(1.2)
    before = slabs()
    decoding = asyncio.create_task(stream(client, "1b", 100, 1500 // scale, 3))
    await asyncio.sleep(1.0)
    burst = [stream(client, "8b", 3000 // scale, 32, 2000 + i) for i in range(24)]
    ttfts = [run["ttft"] for run in await asyncio.gather(*burst)]
    await asyncio.sleep(1.2)
    after = slabs()
    meanwhile = await decoding
    return {
        "slabs_before": before,
        "slabs_after": after,
        "burst_ttft_s": {"median": statistics.median(ttfts), "max": max(ttfts)},
        "neighbour_gap_ms": {"median": 1000 * meanwhile["gap"], "worst": 1000 * meanwhile["worst"]},
    }


def write_config(folder: Path, memory: str, is_rehearsal: bool) -> Path:
    """Both models, with their directories."""
    large, small = ("rehearsal",) * 2 if is_rehearsal else ("llama-3-8b", "llama-3.2-1b")
    for name in {large, small}:
        write_shape(name, folder)
    config = folder / "prism.yaml"
    device = "kind: cpu, threads: 1" if is_rehearsal else "kind: cuda"
    text = CONFIG.format(memory=memory, device=device, large=large, small=small, port=PORT, admin=ADMIN)
    config.write_text(text)
    return config


async def measure_server(log: Path, scale: int) -> dict[str, Any]:
    """`measure` with a client of its own."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", limits=limits) as client:
        return await measure(client, log, scale)


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", default="22GiB")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU: tests this script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        with running(write_config(folder, options.memory, options.rehearse), log) as server:
            healthy = server.wait_for(lambda: is_healthy(PORT), 300)
            result = asyncio.run(measure_server(log, 20 if options.rehearse else 1))
    result = {"gpu": gpu_name()} | result | {"start_to_healthy_s": healthy}
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
