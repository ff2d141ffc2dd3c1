"""Makes a trace: popularity by a power law, gamma gaps, models that are on and off, log-normal lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism.sim.trace import TraceRow
from prism.types import ModelId


@dataclass(frozen=True, slots=True)
class Synthetic:
    """What a made trace is like."""

    models: int = 8
    rate: float = 4.0
    """Requests a second of all models together, in the long run."""
    duration: float = 600.0
    alpha: float = 2.1
    """Of the power law: the k-th model is asked in proportion to k to the power of -1 / (alpha - 1)."""
    cv: float = 1.0
    """Of the gaps between a model's requests while it is on: 1 is Poisson, more comes in bursts."""
    on: float = 0.0
    """Mean seconds for which a model is asked without a rest; 0 is always."""
    off: float = 0.0
    """Mean seconds of the rests in between."""
    prompt: float = 300.0
    """Median tokens of prompts."""
    output: float = 120.0
    spread: float = 1.0
    """Of the lengths: standard deviation of their logarithms."""
    longest: int = 8192
    """Most tokens of a prompt, and of an output."""


def generate(synthetic: Synthetic, seed: int) -> list[TraceRow]:
    """The requests in order of arrival; the same ones for the same seed."""
    ranks = np.arange(1, synthetic.models + 1, dtype=float)
    shares = ranks ** (-1.0 / (synthetic.alpha - 1.0))
    shares /= shares.sum()
    rows: list[TraceRow] = []
    for index, share in enumerate(shares):
        random = np.random.default_rng([seed, index])
        model = ModelId(f"m{index:02d}")
        times = _arrivals(synthetic, float(share) * synthetic.rate, random)
        prompts, outputs = (
            _lengths(synthetic, m, len(times), random) for m in (synthetic.prompt, synthetic.output)
        )
        rows += [
            TraceRow(float(at), model, int(p), int(o))
            for at, p, o in zip(times, prompts, outputs, strict=True)
        ]
    return sorted(rows)


def _arrivals(synthetic: Synthetic, rate: float, random: np.random.Generator) -> list[float]:
    """Gaps run over the time in which the model is on, which is then stretched by the rests."""
    busy = 1.0 if synthetic.on <= 0 else synthetic.on / (synthetic.on + synthetic.off)
    shape = 1.0 / synthetic.cv**2
    mean_gap = busy / rate
    times: list[float] = []
    clock = 0.0  # seconds in which it was on
    rest, until = _first_rest(synthetic, random)
    while clock + rest < synthetic.duration:
        clock += random.gamma(shape, mean_gap / shape)
        while clock > until:
            rest += random.exponential(synthetic.off)
            until += random.exponential(synthetic.on)
        if clock + rest < synthetic.duration:
            times.append(clock + rest)
    return times


def _first_rest(synthetic: Synthetic, random: np.random.Generator) -> tuple[float, float]:
    """Seconds before the model is first on, and for how long it is on then."""
    if synthetic.on <= 0 or synthetic.off <= 0:
        return 0.0, float("inf")
    is_on = random.random() < synthetic.on / (synthetic.on + synthetic.off)
    return (0.0 if is_on else random.exponential(synthetic.off)), random.exponential(synthetic.on)


def _lengths(synthetic: Synthetic, median: float, count: int, random: np.random.Generator) -> list[int]:
    drawn = median * np.exp(synthetic.spread * random.standard_normal(count))
    return [int(n) for n in np.clip(np.rint(drawn), 1, synthetic.longest)]
