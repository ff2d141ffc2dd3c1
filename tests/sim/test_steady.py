"""A steady load keeps models still, with everything between requests and placement simulated, too."""

from __future__ import annotations

from collections import Counter

import pytest

from prism.modes import Mode
from prism.sim.controlling import Kind
from prism.sim.generate import Synthetic
from prism.sim.inputs import Inputs, make_cluster, open_profile, read_workload


@pytest.mark.parametrize(
    ("seed", "models", "rate", "devices"), [(0, 12, 4.0, 3), (1, 20, 3.0, 4), (2, 8, 5.0, 2), (5, 20, 8.0, 4)]
)
def test_after_settling_no_model_moves_twice_in_ten_minutes(
    seed: int, models: int, rate: float, devices: int
) -> None:
    """Poisson arrivals for 20 minutes; what happens in the second ten.

    In the second nobody asks for a large model for a minute now and then: while it counted as idle at
    once, small ones moved to its device and away again.
    """
    made = Synthetic(models=models, rate=rate, duration=1200.0, prompt=2000, output=40)
    profile = open_profile("h100")
    inputs = Inputs(None, made, None, "h100", None, None, 2, 1.0, 5.0, seed)
    cluster = make_cluster(inputs, read_workload(inputs, profile), profile, Mode.PRISM)
    done = [each for each in cluster.run_controlled(devices).done if each.at >= 600]
    moved = Counter(each.model for each in done if each.kind in (Kind.MIGRATION, Kind.MERGE))
    assert max(moved.values(), default=0) <= 1, done
    assert len(done) <= 3, done
