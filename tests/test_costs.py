"""Costs of steps: chunks that fit a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.costs import StepCosts, measured

knots = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(1e-4, 0.1)), min_size=2, max_size=8, unique_by=lambda k: k[0]
)


@given(knots, st.sampled_from([0.0, 1e-10, 1e-8]), st.floats(0, 0.3), st.sampled_from([0, 1000, 20000]))
def test_the_largest_chunk_that_fits(
    points: list[tuple[int, float]], per_pair: float, seconds: float, start: int
) -> None:
    costs = measured(points, per_pair, 0.0)
    tokens = costs.tokens_within(seconds, start)
    if tokens:
        assert costs.prefill(tokens, start) <= seconds
    assert tokens == (1 << 20) - 1 or costs.prefill(tokens + 1, start) > seconds * (1 - 1e-9)


def test_nothing_fits() -> None:
    assert StepCosts(((1, 0.01), (100, 0.02)), 0.0, 0.0).tokens_within(0.009) == 0
    assert StepCosts(((1, 0.01), (101, 0.02)), 0.0, 0.0).tokens_within(0.015) == pytest.approx(51, abs=1)
