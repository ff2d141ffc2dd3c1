"""Figures of one engine on a GPU: bandwidth, decode steps, first tokens."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import torch
from local import LocalModel, drive, prompt

CONTEXT = 1024


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device copy of 4 GiB."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    target.copy_(source)
    start.record()
    for _ in range(3):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3
    return 3 * 2 * (4 << 30) / seconds


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 20) -> float:
    """Median milliseconds of a graph, after two replays that do not count."""
    times = list[float]()
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def decode(
    model: LocalModel, batch: int, bandwidth: float, steps: int = 128, **params: Any
) -> dict[str, Any]:
    """Median milliseconds between tokens at `batch` sequences of about `CONTEXT` tokens.

    Of the host's time for a step the mean, which sequences that begin and end are part of, and the median.
    """
    times: list[float] = []
    for i in range(batch):
        model.add(f"d{i}", prompt(i, CONTEXT), steps, **params)
    driven = drive(
        [model], on_drawn=lambda _m, drawn, now: times.append(now) if len(drawn) == batch else None
    )
    gaps = [b - a for a, b in pairwise(times)][16:]
    context = CONTEXT + steps // 2 + 8
    read = model.read_bytes() + batch * context * model.profile.spec.kv_bytes_per_token
    step = statistics.median(gaps)
    return {
        "batch": batch,
        "step_ms": round(step * 1e3, 3),
        "floor_ms": round(read / bandwidth * 1e3, 3),
        "x_floor": round(step * bandwidth / read, 3),
        "p99_ms": round(sorted(gaps)[int(len(gaps) * 0.99)] * 1e3, 3),
        "host_ms_per_decode": round(statistics.mean(spent for _, spent in driven.decodes) * 1e3, 3),
        "host_ms_median": round(
            statistics.median(spent for rows, spent in driven.decodes if rows == batch) * 1e3, 3
        ),
    }


def first_token(model: LocalModel, length: int, runs: int = 5) -> dict[str, Any]:
    """Milliseconds from `add` to the first token on the host."""
    times = []
    model.settle()
    for i in range(runs + 2):
        model.add(f"t{i}", prompt(1000 * length + i, length), 1)
        times.append(drive([model]).wall_s)
    return {"prompt": length, "ttft_ms": round(statistics.median(times[2:]) * 1e3, 2)}
