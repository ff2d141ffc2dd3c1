"""What steps and loads cost: the model, its start and its corrections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.costs import (
    KNOT_TOKENS,
    Corrections,
    Costs,
    DeviceRates,
    LoadCosts,
    Shape,
    StepCosts,
    from_shape,
    measured,
)
from prism.types import Bytes, Seconds

RATES = DeviceRates(flops=7.9e14, bandwidth=4.2e12, link=4.5e10, launch=Seconds(1.2e-5))
LLAMA_8B = Shape(7.5e9, Bytes(16_060_000_000), Bytes(15_010_000_000), Bytes(131_072), 32, 4096, Bytes(0))
COSTS = from_shape(LLAMA_8B, RATES)


def test_between_knots_in_straight_lines() -> None:
    steps = StepCosts(((1, 1.0), (10, 2.0), (20, 4.0)), per_pair=0.5, per_context=0.25)
    assert [steps.gemm(n) for n in (1, 10, 15, 20)] == [1.0, 2.0, 3.0, 4.0]
    assert steps.gemm(30) == pytest.approx(6.0), "beyond the last knot the line goes on"
    assert steps.step(10, pairs=4, context=8) == 2.0 + 2.0 + 2.0
    assert steps.decode(10, 8) == 4.0


def test_steps_with_prompts_have_a_curve_of_their_own() -> None:
    """Few tokens in a prompt wait for launches, as many decodes do not."""
    steps = StepCosts(((1, 1.0), (10, 2.0)), 0.5, 0.25, prompt_knots=((4, 8.0), (14, 9.0)))
    assert steps.decode(4, 0) == pytest.approx(4 / 3)
    assert steps.step(4, pairs=2) == 8.0 + 1.0
    assert steps.tokens_within(8.0) == 0
    assert steps.tokens_within(8.0 + 0.5 * 4 * 2) == 4
    prompts_seen = Corrections()
    for _ in range(100):
        prompts_seen.saw_prompt(1.0, 3.0)
    corrected = prompts_seen.apply(Costs(steps, LoadCosts(Seconds(0), 1), LLAMA_8B)).steps
    assert corrected.knots == steps.knots and corrected.prefill(4) == pytest.approx(
        3 * steps.prefill(4), 0.01
    )


def test_a_start_from_shape_and_rates_is_near_what_was_measured() -> None:
    """One H200: 3.8 ms at batch 1, 7.1 at batch 64 with 1,088 tokens each, 98 ms for a prompt of 4,000."""
    assert COSTS.steps.decode(1, 1_088) == pytest.approx(0.0038, rel=0.15)
    assert COSTS.steps.decode(64, 64 * 1_088) == pytest.approx(0.0071, rel=0.15)
    assert COSTS.steps.prefill(4_000) == pytest.approx(0.098, rel=0.25)
    assert COSTS.activation == pytest.approx(0.36, rel=0.1)


@given(st.floats(0.001, 0.5), st.integers(0, 8_000))
def test_the_largest_chunk_within_a_time(seconds: float, start: int) -> None:
    tokens = COSTS.steps.tokens_within(seconds, start)
    if tokens:
        assert COSTS.steps.prefill(tokens, start) <= seconds * (1 + 1e-9)
    assert COSTS.steps.prefill(tokens + 1, start) > seconds * (1 - 1e-9)


def test_measured_knots_grow_and_need_two() -> None:
    steps = measured([(64, 1.0), (1, 2.0), (256, 3.0)], -1e-9, 1e-9)
    assert steps.knots == ((1, 2.0), (64, 2.0), (256, 3.0)) and steps.per_pair == 0.0
    with pytest.raises(ValueError, match="two knots"):
        measured([(1, 1.0)], 0.0, 0.0)
    with pytest.raises(ValueError, match="two knots"):
        measured([(1, 1.0), (2, 1.0)], 0.0, 0.0, [(4, 2.0)])


def test_corrections_come_near_what_is_seen() -> None:
    corrections = Corrections()
    for _ in range(300):
        corrections.saw_decode(0.004, 0.006)
        corrections.saw_prompt(0.1, 0.08)
        corrections.saw_load(0.4, 0.8)
    costs = corrections.apply(COSTS)
    assert costs.steps.decode(8, 1_000) == pytest.approx(1.5 * COSTS.steps.decode(8, 1_000), rel=0.01)
    assert costs.steps.prefill(2_048) == pytest.approx(0.8 * COSTS.steps.prefill(2_048), rel=0.01)
    assert costs.activation == pytest.approx(2 * COSTS.activation, rel=0.01)
    knots = [seconds for _, seconds in costs.steps.knots]
    assert knots == sorted(knots) and [n for n, _ in costs.steps.knots] == list(KNOT_TOKENS)


def test_an_outlier_moves_little() -> None:
    """A kernel that was compiled, or a host that paused."""
    corrections = Corrections()
    corrections.saw_decode(0.004, 68.0)
    assert corrections.decode <= 1.06
    corrections.saw_load(0.0, 0.0)
    assert corrections.load > 0


def test_a_load_is_its_fixed_part_and_its_bytes() -> None:
    assert LoadCosts(Seconds(0.5), 2.0).load(4) == 2.5
    assert isinstance(COSTS, Costs)
