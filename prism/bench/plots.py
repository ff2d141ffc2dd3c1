"""Plots of a run as SVG, for the report."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prism.bench.metrics import attained
from prism.bench.outcomes import Record
from prism.errors import ConfigError

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter
except ModuleNotFoundError:
    raise ConfigError(["--html needs matplotlib: pip install 'prism-serve[bench]'"]) from None

WIDTH, HEIGHT = 9.0, 3.6
MAX_LINES = 20
"""Models with a line of their own; more could not be told apart."""
NUM_BINS = 60


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "prism", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def latency_cdf(
    models: Mapping[str, Sequence[Record]], name: str, value: Callable[[Record], float | None]
) -> bytes:
    """Which share of each model's requests took at most so long; finished ones only."""
    figure, axes = _figure()
    shown = sorted(models, key=lambda key: -len(models[key]))[:MAX_LINES]
    for key in shown:
        values = sorted(1000 * v for r in models[key] if r.is_finished and (v := value(r)) is not None)
        if values:
            axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=key)
    axes.set(xlabel=f"{name} (ms)", ylabel="share of requests", xscale="log", ylim=(0, 1.01))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    if axes.lines:
        axes.legend(fontsize="x-small", ncols=1 + len(shown) // 10, loc="lower right")
    return svg(figure)


def attainment_bars(models: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Shares of each model's requests within their objectives."""
    figure, axes = _figure()
    places = np.arange(len(models))
    for offset, name in enumerate(("ttft", "tpot", "both")):
        shares = [100 * (entry["attainment"][name] or 0.0) for entry in models.values()]
        axes.bar(places + 0.27 * (offset - 1), shares, 0.25, label=name)
    axes.set_xticks(places, list(models), rotation=60, ha="right", fontsize="x-small")
    axes.set(ylabel="% within objective", ylim=(0, 101))
    axes.legend(fontsize="x-small")
    return svg(figure)


def timeline(records: Sequence[Record], duration: float) -> bytes:
    """Requests that came and that ended well, a second; and attainment of those that came then."""
    figure, axes = _figure()
    edges = np.linspace(0.0, duration, NUM_BINS + 1)
    width = duration / NUM_BINS
    arrived, _ = np.histogram([record.request.at for record in records], edges)
    finished, _ = np.histogram([record.end for record in records if record.is_finished], edges)
    axes.step(edges[:-1], arrived / width, where="post", label="arrivals/s")
    axes.step(edges[:-1], finished / width, where="post", label="finished/s")
    axes.set(xlabel="seconds", ylabel="requests/s")
    met = [(record.request.at, both) for record in records if (both := attained(record).both) is not None]
    if met:
        times, values = np.array(met, dtype=float).T
        total, _ = np.histogram(times, edges)
        good, _ = np.histogram(times, edges, weights=values)
        share = np.divide(100 * good, total, out=np.full(NUM_BINS, np.nan), where=total > 0)
        right = axes.twinx()
        right.plot(edges[:-1] + width / 2, share, "k.", markersize=3)
        right.set(ylabel="% within objectives (dots)", ylim=(0, 101))
    axes.legend(fontsize="x-small", loc="upper left")
    return svg(figure)


def activity(models: Mapping[str, Sequence[Record]]) -> bytes:
    """When each model was asked: red what did not finish or was late."""
    figure, axes = _figure()
    figure.set_figheight(1.2 + 0.18 * len(models))
    for place, records in enumerate(models.values()):
        for good, color in ((True, "tab:green"), (False, "tab:red")):
            times = [
                r.request.at for r in records if (r.is_finished and attained(r).both is not False) is good
            ]
            axes.plot(times, [place] * len(times), "|", color=color, markersize=5)
    axes.set_yticks(range(len(models)), list(models), fontsize="x-small")
    axes.set(xlabel="seconds", ylim=(-0.6, len(models) - 0.4))
    return svg(figure)
