"""Plots of results, if matplotlib is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prism.errors import ConfigError


def need_matplotlib() -> None:
    """Raises `ConfigError` without it."""
    if find_spec("matplotlib") is None:
        raise ConfigError(["--plot needs matplotlib: pip install 'prism-serve[bench]'"])


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be written: {error}"]) from None


def plot_attainment(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], across: str, path: Path
) -> None:
    """A line for each mode: (devices or load, TTFT attainment, TPOT attainment)."""
    figure, axes = _figure(2)
    for column, (axis, title) in enumerate(zip(axes, ("TTFT", "TPOT"), strict=True), start=1):
        for mode, points in curves.items():
            ordered = sorted(points)
            axis.plot([p[0] for p in ordered], [p[column] for p in ordered], marker="o", label=mode)
        axis.set_xlabel(across)
        axis.set_ylabel(f"{title} attainment")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, path)


def plot_models(result: Mapping[str, Any], path: Path) -> None:
    """Attainment of each model of a run, the most asked first."""
    figure, axes = _figure(2)
    models = sorted(result["models"].items(), key=lambda item: -item[1]["requests"])
    names = [name for name, _ in models]
    for axis, title in zip(axes, ("ttft", "tpot"), strict=True):
        axis.bar(range(len(names)), [model[f"{title}_attainment"] for _, model in models])
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_ylabel(f"{title.upper()} attainment")
        axis.set_ylim(0, 1.02)
    _save(figure, path)
