"""Prism against `transformers serve --continuous-batching` on the CPU, with the same model, client and run.

Usage: scripts/bench cpu [--runs 5] [--output results.json]
The other side needs `accelerate`, which comes with the development tools.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from model import prompt, write_model

PROMPT_TOKENS, OUTPUT_TOKENS, BATCHES = 64, 128, (1, 8)
PRISM_PORT, ADMIN_PORT, OTHER_PORT = 8360, 8361, 8362
CONFIG = """
models: [{{name: bench, path: "{path}", preload: true}}]
devices: [{{memory: 2GiB, threads: 2}}]
server: {{port: {port}, admin_port: {admin}}}
"""


async def one(client: httpx.AsyncClient, model: str, seed: int) -> int:
    """One request; completion tokens."""
    body = {
        "model": model,
        "prompt": prompt(seed, PROMPT_TOKENS),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
    }
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    tokens = int(response.json()["usage"]["completion_tokens"])
    assert tokens == OUTPUT_TOKENS, tokens
    return tokens


async def rate(port: int, model: str, batch: int, first_seed: int) -> float:
    """Output tokens per second of `batch` concurrent requests."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
        begin = time.perf_counter()
        tokens = await asyncio.gather(*(one(client, model, first_seed + i) for i in range(batch)))
        return sum(tokens) / (time.perf_counter() - begin)


def is_healthy(port: int) -> bool:
    """Whether /health answers 200."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def is_loaded() -> bool:
    """Whether Prism's model can run steps."""
    try:
        models = httpx.get(f"http://127.0.0.1:{ADMIN_PORT}/admin/models", timeout=2).json()["models"]
    except httpx.HTTPError:
        return False
    return all(model["report"] and model["report"]["state"] == "active" for model in models)


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[float]:
    """Runs a server; gives the seconds from exec until it was healthy and its model loaded."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=log.open("wb"), stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "2"}
    )
    try:
        while not (is_healthy(port) and (port != PRISM_PORT or is_loaded())):
            assert process.poll() is None and time.perf_counter() - begin < 120, log.read_text()
            time.sleep(0.02)
        yield time.perf_counter() - begin
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def measure(name: str, command: list[str], port: int, model: str, runs: int, log: Path) -> dict[str, Any]:
    """One server's figures: a warm-up, then medians of `runs`."""
    with server(command, port, log) as healthy:
        result: dict[str, Any] = {"exec_to_loaded_s": round(healthy, 2)}
        for batch in BATCHES:
            asyncio.run(rate(port, model, batch, 1000))
            rates = [asyncio.run(rate(port, model, batch, 100 * run)) for run in range(runs)]
            result[f"output_tok_s_batch_{batch}"] = round(statistics.median(rates), 1)
            result[f"all_batch_{batch}"] = [round(value, 1) for value in rates]
    print(name, json.dumps(result), flush=True)
    return result


def machine() -> dict[str, str]:
    """What it ran on."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "cpu": f"{model}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measures both and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(write_model(folder / "model"))
        config = folder / "prism.yaml"
        config.write_text(CONFIG.format(path=model, port=PRISM_PORT, admin=ADMIN_PORT))
        launcher = "from prism.cli.main import main; main()"
        prism = [sys.executable, "-c", launcher, "serve", str(config)]
        other = [str(Path(sys.executable).with_name("transformers")), "serve", model]
        other += [
            "--continuous-batching",
            "--port",
            str(OTHER_PORT),
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
        ]
        results: dict[str, Any] = {"machine": machine()}
        results["transformers"] = measure(
            "transformers", other, OTHER_PORT, model, options.runs, folder / "other.log"
        )
        results["prism"] = measure("prism", prism, PRISM_PORT, "bench", options.runs, folder / "prism.log")
    for batch in BATCHES:
        key = f"output_tok_s_batch_{batch}"
        results[f"ratio_batch_{batch}"] = round(results["prism"][key] / results["transformers"][key], 3)
    text = json.dumps(results, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
