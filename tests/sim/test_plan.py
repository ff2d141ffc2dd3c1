"""The search for the fewest devices."""

from __future__ import annotations

import pytest

from prism.modes import Mode
from prism.sim.cluster import Cluster
from prism.sim.generate import Synthetic
from prism.sim.inputs import Inputs, default_placement, make_cluster, open_profile, read_workload
from prism.sim.placing import Placement
from prism.sim.plan import Plan, Planner, Target, steps
from prism.sim.report import report
from prism.sim.searches import Search, carry_out


def cluster(mode: Mode, **changes: object) -> Cluster:
    made = Synthetic(models=8, rate=6.0, duration=20.0, prompt=200, output=40)
    inputs = Inputs(None, made, None, "h100", None, None, None, 1.0, 8.0, 1)
    profile = open_profile("h100")
    return make_cluster(inputs, read_workload(inputs, profile), profile, mode)


def search(made: Cluster, target: Target, most: int) -> Plan:
    found = Search(Planner(made, target), steps(target, most))
    return carry_out({0: found}, 1, lambda *_: None)[0]


def test_the_plan_meets_the_target_and_one_device_less_does_not() -> None:
    made = cluster(Mode.ELASTIC)
    plan = search(made, Target(0.9, 0.9), 8)
    assert plan.num_devices is not None and plan.num_devices > 1
    assert plan.trials[plan.num_devices].meets(Target(0.9, 0.9))
    assert not plan.trials[plan.num_devices - 1].meets(Target(0.9, 0.9))
    placement = plan.trials[plan.num_devices].placement
    again = report(made.load, placement, made.setup, made.run(placement))
    assert again["ttft_attainment"] == plan.trials[plan.num_devices].ttft
    assert again["tpot_attainment"] == plan.trials[plan.num_devices].tpot
    assert again["attainment"] == plan.trials[plan.num_devices].both < again["ttft_attainment"]


def test_the_controller_is_tried_where_it_moves_models() -> None:
    """Placements that stay were all that was tried, and models that move are better off."""
    made = cluster(Mode.PRISM)
    trial = Planner(made, Target(1.0, 1.0)).best(2)
    run = made.run_controlled(2, is_expected=True)
    result = report(made.load, run.placement, made.setup, run.results, run.done)
    assert trial.ttft + trial.tpot >= result["ttft_attainment"] + result["tpot_attainment"]
    assert Planner(made, Target(1.0, 1.0)).best(1).is_controlled is False


def test_too_few_devices() -> None:
    plan = search(cluster(Mode.TIMESHARE), Target(1.0, 1.0), 1)
    assert plan.num_devices is None and list(plan.trials) == [1]


def test_a_report_counts_every_request() -> None:
    made = cluster(Mode.STATIC)
    placement = default_placement(made, 1)  # too small for all weights
    assert placement.unplaced
    result = report(made.load, placement, made.setup, made.run(placement))
    ends = sum(result[end] for end in ("served", "expired", "timed_out", "no_place", "too_long"))
    assert ends == result["requests"] == len(made.load.requests) and result["no_place"] > 0
    assert result["requests"] == sum(model["requests"] for model in result["models"].values())
    assert result["ttft_attainment"] <= 1 - result["no_place"] / result["requests"]


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism.sim.cluster.FEW", 0)
    made = cluster(Mode.PRISM)
    placement: Placement = default_placement(made, 3)
    assert made.run(placement, processes=2) == made.run(placement)
