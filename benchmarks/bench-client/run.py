"""How much the client of `prism bench` can send and read, beside httpx and asyncio's own loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop

from prism.bench.replay import Replay
from prism.bench.targets import Defaults, make_targets
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned

RATE, TOKENS, GAP, SECONDS, PROMPT = 200, 50, 0.01, 15, 500
"""Requests a second, tokens of each, seconds between two, length of the run, tokens of prompts."""


def plan(url: str) -> list[Planned]:
    target = make_targets(["m"], None, Defaults(url, "/v1/completions"))["m"]
    return [Planned(i, i / RATE, target, PROMPT, TOKENS) for i in range(RATE * SECONDS)]


async def ours(url: str) -> dict[str, float]:
    planned = plan(url)
    bodies = encode_all(planned, Style(), 0)
    cpu = time.process_time()
    run = await Replay(planned, bodies, timeout=60).run()
    finished = [record for record in run.records if record.is_finished]
    late = 1000 * np.array([record.lateness for record in run.records])
    return {
        "finished": len(finished),
        "tokens": sum(len(record.times) for record in finished),
        "seconds": run.duration,
        "cpu": time.process_time() - cpu,
        "late_p99_ms": float(np.percentile(late, 99)),
        "ttft_p50_ms": 1000 * float(np.median([record.ttft for record in finished])),
        "tpot_p50_ms": 1000 * float(np.median([record.tpot or 0 for record in finished])),
    }


async def with_httpx(url: str) -> dict[str, float]:
    planned = plan(url)
    bodies = [body.partition(b"\r\n\r\n")[2] for body in encode_all(planned, Style(), 0)]
    late, firsts, counts = [], [], []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60, trust_env=False) as client:

        async def one(at: float, body: bytes) -> None:
            start = time.perf_counter()
            late.append(start - at)
            times = []
            async with client.stream("POST", f"{url}/v1/completions", content=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
            firsts.append(times[0] - start)
            counts.append(len(times) - 1)

        cpu, begin = time.process_time(), time.perf_counter() + 0.05
        tasks = []
        for planned_one, body in zip(planned, bodies, strict=True):
            await asyncio.sleep(max(0.0, begin + planned_one.at - time.perf_counter()))
            tasks.append(asyncio.create_task(one(begin + planned_one.at, body)))
        await asyncio.gather(*tasks)
    return {
        "finished": len(counts),
        "tokens": sum(counts),
        "seconds": time.perf_counter() - begin,
        "cpu": time.process_time() - cpu,
        "late_p99_ms": 1000 * float(np.percentile(late, 99)),
        "ttft_p50_ms": 1000 * float(np.median(firsts)),
    }


def measure(name: str, client: Callable[[str], Awaitable[dict[str, float]]], runner: Any) -> None:
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(TOKENS), str(GAP)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        figures = runner(client(f"http://127.0.0.1:{int(server.stdout.readline())}"))
        server.kill()
    print(f"{name:<16}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()), flush=True)


if __name__ == "__main__":
    measure("uvloop", ours, uvloop.run)
    measure("asyncio", ours, asyncio.run)
    measure("httpx on uvloop", with_httpx, uvloop.run)
