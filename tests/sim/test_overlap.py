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
    (("8B", 1), ("1B", 1), 6.51, 3.37),
    (("8B", 4), ("1B", 4), 8.17, 3.56),
    (("8B", 16), ("1B", 16), 8.74, 4.07),
    (("8B", 1), ("1B", 16), 6.02, 7.48),
    (("8B", 16), ("1B", 1), 12.3, 1.81),
    (("1B", 1), ("1B", 1), 1.73, 1.73),
    (("1B", 4), ("1B", 4), 2.19, 2.19),
    (("8B", 4), ("8B", 4), 11.1, 11.1),
]


def decoding(name: str, batch: int) -> SimModel:
    """A model in the midst of decodes."""
    knots = tuple((size, ms / 1000) for size, ms in ALONE[name].items())
    shape = Shape(1e9, Bytes(2 << 30), Bytes(2 << 30), Bytes(1 << 17), LAYERS[name], 4096)
    costs = Costs(StepCosts(knots, 1e-9, 0.0), LoadCosts(Seconds(0.01), 5e10), shape)
    model = SimModel(Served(ModelId(name), name, costs, 8192, Slo(Seconds(1), Seconds(1))), Bytes(2 << 20))
    model.state = ModelState.ACTIVE
    model.decodes.size = batch
    return model


@pytest.mark.parametrize(("one", "other", "ms", "other_ms"), MEASURED)
def test_pairs_are_near_what_was_measured(
    one: tuple[str, int], other: tuple[str, int], ms: float, other_ms: float
) -> None:
    overlap = Overlap(lambda lanes: 1.27 if lanes == 2 else 1.0)
    models = [decoding(*one), decoding(*other)]
    for (name, batch), model, beside, measured in (
        (one, models[0], models[1], ms),
        (other, models[1], models[0], other_ms),
    ):
        longer = overlap.beside((overlap.pull([beside]),))(model)
        assert longer * ALONE[name][batch] == pytest.approx(measured, rel=0.2)


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
