"""How decodes of several lanes slow each other down, beside what was measured."""

from __future__ import annotations

import pytest

from prism.costs import Costs, LoadCosts, Shape, StepCosts
from prism.sim.jobs import Served
from prism.sim.model import SimModel
from prism.sim.overlap import Overlap
from prism.types import Bytes, ModelId, ModelState, Seconds, Slo

ALONE = {"8B": {1: 5.17, 4: 6.42, 16: 6.88}, "1B": {1: 1.02, 4: 1.38, 16: 1.52}}
"""One H100, ms a step, 512 tokens of context (benchmarks/engine)."""
LAYERS = {"8B": 32, "1B": 16}
MEASURED = [
    (("8B", 1), ("1B", 1), 6.51 / 5.17, 3.37 / 1.02),
    (("8B", 4), ("1B", 4), 8.17 / 6.42, 3.56 / 1.38),
    (("8B", 16), ("1B", 16), 8.74 / 6.88, 4.07 / 1.52),
    (("8B", 1), ("1B", 16), 6.02 / 5.17, 7.48 / 1.52),
    (("1B", 1), ("1B", 1), 1.73 / 1.02, 1.73 / 1.02),
    (("1B", 4), ("1B", 4), 2.19 / 1.38, 2.19 / 1.38),
    (("8B", 4), ("8B", 4), 11.1 / 6.42, 11.1 / 6.42),
]
"""Times their time alone."""
IN_A_SERVER = [
    (("1B", 1), ("1B", 1), 1.67, 1.67),
    (("1B", 1), ("1B", 4), 1.33, 2.24),
    (("1B", 4), ("1B", 4), 1.57, 1.57),
    (("1B", 1), ("8B", 1), 3.20, 1.27),
    (("1B", 1), ("8B", 4), 1.89, 1.62),
    (("1B", 4), ("8B", 1), 4.85, 1.16),
    (("1B", 4), ("8B", 4), 2.60, 1.30),
]
"""Medians of steps that a neighbour ran beside all along (benchmarks/sharing, another H100)."""


def decoding(name: str, batch: int) -> SimModel:
    """A model in the midst of decodes."""
    knots = tuple((size, ms / 1000) for size, ms in ALONE[name].items())
    shape = Shape(1e9, Bytes(2 << 30), Bytes(2 << 30), Bytes(1 << 17), LAYERS[name], 4096, Bytes(0))
    costs = Costs(StepCosts(knots, 1e-9, 0.0), LoadCosts(Seconds(0.01), 5e10), shape)
    model = SimModel(Served(ModelId(name), name, costs, 8192, Slo(Seconds(1), Seconds(1))), Bytes(2 << 20))
    model.state = ModelState.ACTIVE
    model.decodes.size = batch
    return model


@pytest.mark.parametrize(("one", "other", "longer", "other_longer"), MEASURED + IN_A_SERVER)
def test_pairs_are_near_what_was_measured(
    one: tuple[str, int], other: tuple[str, int], longer: float, other_longer: float
) -> None:
    """Within 13 %: by a rule that served all kernels evenly, steps beside shorter ones lost too little."""
    overlap = Overlap(lambda lanes: 1.27 if lanes == 2 else 1.0)
    models = [decoding(*one), decoding(*other)]
    for model, beside, measured in ((models[0], models[1], longer), (models[1], models[0], other_longer)):
        assert overlap.beside((overlap.pull([beside]),))(model) == pytest.approx(measured, rel=0.13)


def test_an_8b_of_many_rows_beside_a_1b_of_one_is_the_worst() -> None:
    overlap = Overlap(lambda lanes: 1.27)
    large, small = decoding("8B", 16), decoding("1B", 1)
    assert overlap.beside((overlap.pull([small]),))(large) == pytest.approx(12.3 / 6.88, rel=0.21)
    assert overlap.beside((overlap.pull([large]),))(small) == pytest.approx(1.81 / 1.02, rel=0.13)


def test_equal_lanes_do_what_the_profile_says() -> None:
    """Of two, and of four whose overlap is another."""
    overlap = Overlap({2: 1.3, 4: 1.7}.__getitem__)
    model = decoding("1B", 4)
    pull = overlap.pull([decoding("1B", 4)])
    assert overlap.beside((pull,))(model) == pytest.approx(2 / 1.3)
    assert overlap.beside((pull,) * 3)(model) == pytest.approx(4 / 1.7)
    assert overlap.beside(())(model) == 1


def test_a_lane_pulls_as_its_models_do_on_the_whole() -> None:
    overlap = Overlap(lambda lanes: 1.3)
    large, small = decoding("8B", 4), decoding("1B", 4)
    both = overlap.pull([large, small])
    assert overlap.pull([small]) < both < overlap.pull([large])
    small.state = ModelState.COLD
    assert overlap.pull([large, small]) == overlap.pull([large])
    assert overlap.pull([small]) == 0
