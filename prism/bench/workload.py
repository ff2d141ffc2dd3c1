"""Which request leaves when: from a trace, a generator, or at a rate with equal lengths. Pure; by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism.bench.targets import Target
from prism.sim.trace import TraceRow, clip
from prism.types import ModelId

JITTER_SECONDS = 2.0
"""Copies that `scaled_rate` adds to a request follow it within so long."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request before it is sent."""

    index: int
    at: float
    """Seconds after the start."""
    target: Target
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Steady:
    """Traffic of `vllm bench serve --dataset-name random`."""

    num_requests: int
    rate: float
    """Requests a second; infinity sends all at once."""
    burstiness: float
    """Shape of the gamma distribution of gaps: 1 is Poisson, less comes in bursts."""
    prompt: int
    output: int
    spread: float = 0.0
    """Lengths are uniform from (1 - spread) to (1 + spread) times the above."""


def steady(traffic: Steady, keys: Sequence[str], seed: int) -> list[TraceRow]:
    """Requests for models drawn evenly from `keys`. As vLLM does, times are scaled to the wanted rate."""
    random = np.random.default_rng(seed)
    count = traffic.num_requests
    times = np.zeros(count)
    if np.isfinite(traffic.rate):
        times = np.cumsum(random.gamma(traffic.burstiness, 1.0, count))
        times *= count / traffic.rate / max(times[-1], np.finfo(float).tiny)  # short bursts are all zeros
    models = random.integers(0, len(keys), count)
    prompts, outputs = (_lengths(n, traffic.spread, count, random) for n in (traffic.prompt, traffic.output))
    return [
        TraceRow(float(at), ModelId(keys[model]), prompt, output)
        for at, model, prompt, output in zip(times, models, prompts, outputs, strict=True)
    ]


def _lengths(middle: int, spread: float, count: int, random: np.random.Generator) -> list[int]:
    low, high = max(1, round(middle * (1 - spread))), max(1, round(middle * (1 + spread)))
    return [int(n) for n in random.integers(low, high + 1, count)]


def scaled_rate(rows: Sequence[TraceRow], factor: float, seed: int) -> list[TraceRow]:
    """So many times as many requests in the same time: some are left out, or have copies that follow them.

    Unlike a change of speed this keeps the length of bursts and rests.
    """
    random = np.random.default_rng(seed)
    whole, part = divmod(factor, 1.0)
    result = []
    for row in rows:
        count = int(whole) + int(random.random() < part)
        delays = [0.0, *random.uniform(0.0, JITTER_SECONDS, max(0, count - 1))]
        result += [row._replace(arrival=row.arrival + float(delay)) for delay in delays[:count]]
    return sorted(result)


def plan(rows: Sequence[TraceRow], targets: Mapping[str, Target]) -> list[Planned]:
    """The requests as they can be served: from the first arrival on, shortened to their models' contexts."""
    begin = min((row.arrival for row in rows), default=0.0)
    planned = []
    for index, row in enumerate(sorted(rows, key=lambda row: row.arrival)):
        target = targets[row.model]
        prompt, output = clip(row.prompt, row.output, target.context)
        planned.append(Planned(index, row.arrival - begin, target, prompt, output))
    return planned
