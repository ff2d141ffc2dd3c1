"""Prints how well costs fit what was measured, and the device's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from prism.calibration.fit import errors, predicted
from prism.calibration.steps import Point
from prism.costs import StepCosts
from prism.profile import Profile


def fit_table(costs: StepCosts, points: Sequence[Point]) -> Table:
    """A row for each size."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("STEP", no_wrap=True)
    for name in ("TOKENS", "CONTEXT", "STEPS", "MEASURED", "PREDICTED", "ERROR"):
        table.add_column(name, justify="right", no_wrap=True)
    for point, error in zip(points, errors(costs, points), strict=True):
        work = point.work
        before = work.context / work.tokens if point.kind == "decode" else work.pairs / work.tokens
        table.add_row(
            point.kind,
            str(work.tokens),
            f"{before:.0f}",
            str(point.num_steps),
            f"{1000 * point.seconds:.3f} ms",
            f"{1000 * predicted(costs, point):.3f} ms",
            f"{100 * error:+.1f}%",
        )
    return table


def print_fit(name: str, costs: StepCosts, points: Sequence[Point]) -> None:
    """The table of one model. Context is that of a token: of decodes its own, of prompts the mean."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    sizes = sorted(abs(error) for error in errors(costs, points))
    console.print(f"\n{name}: error {100 * median(sizes):.1f}% median, {100 * sizes[-1]:.1f}% worst")
    console.print(fit_table(costs, points))


def print_profile(profile: Profile, path: Path) -> None:
    """The device, loads, and where it all is."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    rates = profile.device.rates
    console.print(
        f"\n{profile.device.name}: {rates.flops / 1e12:.3g} TFLOP/s, reads {rates.bandwidth / 1e9:.4g} GB/s, "
        f"link {rates.link / 1e9:.3g} GB/s, {1e6 * rates.launch:.3g} us a layer to launch"
    )
    for lanes, factor in profile.device.overlap.items():
        console.print(f"{lanes} lanes of decodes do {factor:.2f} times as much as one")
    for name, model in profile.models.items():
        seconds = model.costs().activation
        console.print(
            f"{name}: {model.shape.weight_bytes / 1e9:.3g} GB load in {seconds:.3f} s "
            f"({1000 * model.load.fixed:.1f} ms and {model.load.bandwidth / 1e9:.3g} GB/s)"
        )
    console.print(f"written to {path}")
