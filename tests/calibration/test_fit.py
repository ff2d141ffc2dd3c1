"""Costs are found again from times that they made."""

from __future__ import annotations

import numpy as np
import pytest

from prism.calibration.fit import TooFewPoints, errors, fit_steps
from prism.calibration.steps import Point
from prism.costs import StepCosts
from prism.worker.cost_book import Work

TRUE = StepCosts(((1, 0.001), (8, 0.0012), (64, 0.002)), 2e-9, 3e-8, prompt_knots=((64, 0.006), (512, 0.01)))
WORKS = [
    *(Work(n, 0.0, n * context) for n in (1, 8, 64) for context in (16, 4096)),
    *(Work(n, n * (start + n / 2), 0) for n in (64, 512) for start in (0, 2048, 8192)),
]


def points(costs: StepCosts, noise: float = 0.0) -> list[Point]:
    random = np.random.default_rng(0)
    return [
        Point("x", work, costs.step(*work) * float(1 + noise * random.standard_normal()), 9) for work in WORKS
    ]


def test_exact_times_give_the_costs() -> None:
    found = fit_steps(points(TRUE))
    assert [n for n, _ in found.knots] == [1, 8, 64]
    assert [t for _, t in found.knots] == pytest.approx([t for _, t in TRUE.knots])
    assert [n for n, _ in found.prompt_knots] == [64, 512]
    assert [t for _, t in found.prompt_knots] == pytest.approx([t for _, t in TRUE.prompt_knots])
    assert found.per_pair == pytest.approx(TRUE.per_pair)
    assert found.per_context == pytest.approx(TRUE.per_context)


def test_noise_moves_them_little() -> None:
    found = fit_steps(points(TRUE, noise=0.03))
    assert found.per_pair == pytest.approx(TRUE.per_pair, rel=0.15)
    assert found.per_context == pytest.approx(TRUE.per_context, rel=0.15)
    assert max(map(abs, errors(found, points(TRUE)))) < 0.1


def test_context_never_pays() -> None:
    """Times by which more context is quicker: least squares alone would say so."""
    wrong = StepCosts(TRUE.knots, 2e-9, -1e-9, TRUE.prompt_knots)
    found = fit_steps(points(wrong))
    assert found.per_context == 0
    assert found.per_pair == pytest.approx(2e-9, rel=0.05)
    short, long = (
        e for e, w in zip(errors(found, points(wrong)), WORKS, strict=True) if w.tokens == 64 and w.context
    )
    assert short < -0.01 < 0.01 < long, "the knots have not been fitted again"


def test_more_tokens_never_take_less() -> None:
    dented = StepCosts(((1, 0.001), (8, 0.0008), (64, 0.002), (512, 0.01)), 2e-9, 3e-8)
    times = [t for _, t in fit_steps(points(dented)).knots]
    assert times == sorted(times)


def test_what_does_not_vary_is_not_blamed() -> None:
    """One context for each batch: its cost cannot be told from the knots, and belongs to them."""
    found = fit_steps([Point("decode", Work(n, 0.0, 16 * n), 0.001 * n, 9) for n in (1, 2, 4)])
    assert (found.per_context, found.per_pair) == (0, 0)
    assert [t for _, t in found.knots] == pytest.approx([0.001, 0.002, 0.004])


def test_one_size_of_prompts_is_no_curve() -> None:
    found = fit_steps([p for p in points(TRUE) if p.work.tokens < 512])
    assert not found.prompt_knots
    assert [n for n, _ in found.knots] == [1, 8, 64]


def test_one_size_is_too_little() -> None:
    with pytest.raises(TooFewPoints):
        fit_steps([Point("decode", Work(1, 0.0, 16), 0.001, 9)])
