"""Costs that explain measured steps best, by least squares. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prism.calibration.steps import Point
from prism.costs import StepCosts, measured
from prism.errors import PrismError


class TooFewPoints(PrismError):
    """Nothing can be fitted."""


def fit_steps(points: Sequence[Point]) -> StepCosts:
    """A knot at each number of tokens that was measured; errors count in proportion to the time.

    What would be negative is left out, and the rest fitted again: noise must not make context cheap.
    """
    tokens = sorted({point.work.tokens for point in points})
    if len(tokens) < 2:
        raise TooFewPoints("steps of fewer than two sizes could be measured: memory is short")
    rows = np.array([_row(point, tokens) for point in points])
    seconds = np.array([point.seconds for point in points])
    scale = 1.0 / seconds
    used = np.array([True] * len(tokens) + [_varies(points, 1), _varies(points, 2)])
    solution = _solve(rows, scale, used)
    while (solution[-2:] < 0).any():
        used[len(tokens) + int(np.argmin(solution[-2:]))] = False
        solution = _solve(rows, scale, used)
    *knots, per_pair, per_context = solution.tolist()
    floor = float(seconds.min()) / 100  # a knot must take some time, whatever noise says
    pairs = [(n, max(t, floor)) for n, t in zip(tokens, knots, strict=True)]
    return measured(pairs, per_pair, per_context)


def _row(point: Point, tokens: Sequence[int]) -> list[float]:
    knots = [float(point.work.tokens == n) for n in tokens]
    return [*knots, point.work.pairs, float(point.work.context)]


def _varies(points: Sequence[Point], column: int) -> bool:
    """Whether steps of an equal number of tokens differ in it: else it cannot be told from the knots."""
    seen: dict[int, set[float]] = {}
    for point in points:
        seen.setdefault(point.work.tokens, set()).add(point.work[column])
    return any(len(values) > 1 for values in seen.values())


def _solve(
    rows: NDArray[np.float64], scale: NDArray[np.float64], used: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Columns are scaled to like sizes: pairs count in millions."""
    weighted = rows[:, used] * scale[:, None]
    sizes = np.linalg.norm(weighted, axis=0)
    sizes[sizes == 0] = 1.0
    found = np.linalg.lstsq(weighted / sizes, np.ones(len(rows)), rcond=None)[0] / sizes
    solution = np.zeros(rows.shape[1])
    solution[used] = found
    return solution


def predicted(costs: StepCosts, point: Point) -> float:
    """Seconds of a measured step by the costs."""
    return costs.step(*point.work)


def errors(costs: StepCosts, points: Sequence[Point]) -> list[float]:
    """Of each point: predicted over measured, less one."""
    return [predicted(costs, point) / point.seconds - 1 for point in points]
