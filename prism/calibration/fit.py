"""Costs that explain measured steps best, by least squares. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.calibration.steps import Point
from prism.costs import StepCosts, measured
from prism.errors import PrismError


class TooFewPoints(PrismError):
    """Nothing can be fitted."""


def fit_steps(points: Sequence[Point]) -> StepCosts:
    """A knot at each number of tokens that was measured, of decodes and of prompts.

    Errors count in proportion to the time. What would be negative is left out, and the rest fitted again:
    noise must not make context cheap. One size of prompts makes no curve; it counts as one of decodes. Raises
    `TooFewPoints` below two sizes of decodes.
    """
    have_curve = len({point.work.tokens for point in points if point.work.pairs}) > 1
    own = [_Size(have_curve and point.work.pairs > 0, point.work.tokens) for point in points]
    sizes = sorted(set(own))
    if sum(not size.is_prompt for size in sizes) < 2:
        raise TooFewPoints("steps of fewer than two sizes could be measured: memory is short")
    rows = np.array([_row(point, size, sizes) for point, size in zip(points, own, strict=True)])
    seconds = np.array([point.seconds for point in points])
    scale = 1.0 / seconds
    used = np.array([True] * len(sizes) + [_varies(points, 1), _varies(points, 2)])
    solution = _solve(rows, scale, used)
    while (solution[-2:] < 0).any():
        used[len(sizes) + int(np.argmin(solution[-2:]))] = False
        solution = _solve(rows, scale, used)
    *times, per_pair, per_context = solution.tolist()
    floor = float(seconds.min()) / 100  # a knot must take some time, whatever noise says
    knots: dict[bool, list[tuple[int, float]]] = {False: [], True: []}
    for size, time in zip(sizes, times, strict=True):
        knots[size.is_prompt].append((size.tokens, max(time, floor)))
    return measured(knots[False], per_pair, per_context, knots[True])


class _Size(NamedTuple):
    is_prompt: bool
    tokens: int


def _row(point: Point, own: _Size, sizes: Sequence[_Size]) -> list[float]:
    return [*(float(own == size) for size in sizes), point.work.pairs, float(point.work.context)]


def _varies(points: Sequence[Point], column: int) -> bool:
    """Whether steps of an equal size differ in it: else it cannot be told from the knots."""
    seen: dict[tuple[bool, int], set[float]] = {}
    for point in points:
        seen.setdefault((point.work.pairs > 0, point.work.tokens), set()).add(point.work[column])
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
