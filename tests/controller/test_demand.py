from __future__ import annotations

import pytest

from prism.controller.demand import BEYOND, DemandWindow, Load
from prism.messages import WAITS
from prism.types import ModelId, WorkerId
from tests.controller.reports import model_report, report

A = ModelId("a")


def window(**speeds: float) -> DemandWindow:
    named = {WorkerId(name.replace("_", "-")): speed for name, speed in speeds.items()}
    return DemandWindow(60.0, named)


def tell(
    demand: DemandWindow, now: float, tokens: int, worker: str = "worker-0", incarnation: int = 1
) -> None:
    counters = {"num_started": tokens // 10, "prompt_tokens": tokens // 2, "decoded_tokens": tokens // 2}
    blocked = [tokens / 200] * len(WAITS)
    seconds = {"device_seconds": tokens / 50, "needed_seconds": tokens / 100, "blocked_seconds": blocked}
    model = model_report("a", **seconds, **counters)
    demand.on_report(report(worker, model, incarnation=incarnation), now)


def test_rates_are_differences_within_the_window() -> None:
    demand = window()
    assert demand.load(A, 0.0) == Load()
    for second in range(101):
        tell(demand, 1000.0 + second, 5000 + 20 * second)
    load = demand.load(A, 1100.0)
    assert load.token_rate == pytest.approx(20)
    assert load.compute == pytest.approx(0.2 + BEYOND * 0.2), "what is needed, and some of the rest"
    assert load.busy == pytest.approx(0.4), "what steps took, needed or not"
    assert load.blocked == pytest.approx((0.1,) * len(WAITS))
    assert load.request_rate == pytest.approx(2)
    assert load.noise == pytest.approx(120**-0.5)
    assert demand.load(A, 1130.0).token_rate == pytest.approx(10, abs=0.5)
    assert demand.load(A, 1200.0) == Load()


def test_late_requests_count_beyond_what_may_be_chance() -> None:
    for num_late, share in ((0, 0.0), (4, 0.0), (16, 0.08), (100, 0.8)):
        demand = window()
        for now, num_started, late in ((0.0, 7, 3), (60.0, 107, 3 + num_late)):
            model = model_report("a", num_started=num_started, num_late=late)
            demand.on_report(report("worker-0", model), now)
        assert demand.load(A, 60.0).late == pytest.approx(share)


def test_what_was_late_before_a_moment_is_not_late_since() -> None:
    demand = window()
    for now, num_late in ((0.0, 0), (10.0, 50), (20.0, 50), (30.0, 54), (40.0, 55)):
        demand.on_report(report("worker-0", model_report("a", num_started=90, num_late=num_late)), now)
        assert not demand.is_late_since(A, now)
        assert demand.is_late_since(A, 0.0) == (num_late > 0)
        assert demand.is_late_since(A, 10.0) == (num_late == 55), "four may be chance"


def test_all_workers_count_and_fast_ones_more() -> None:
    demand = window(worker_1=2.0)
    for second in (0, 60):
        tell(demand, second, 30 * second)
        tell(demand, second, 10 * second, "worker-1")
    load = demand.load(A, 60.0)
    assert load.token_rate == pytest.approx(40)
    assert load.compute == pytest.approx((0.3 + 2 * 0.1) * (1 + BEYOND))
    assert load.blocked == pytest.approx((0.15 + 0.05,) * len(WAITS)), "as measured where it ran"


def test_a_new_incarnation_counts_from_its_first_report() -> None:
    """Its counters are smaller: the difference would be negative."""
    demand = window()
    tell(demand, 0.0, 1000)
    tell(demand, 30.0, 1600)
    tell(demand, 31.0, 100, incarnation=2)
    tell(demand, 60.0, 700, incarnation=2)
    assert demand.load(A, 60.0).token_rate == pytest.approx(20)


def test_what_was_seen_for_a_moment_is_no_rate() -> None:
    demand = window()
    tell(demand, 0.0, 0)
    tell(demand, 1.0, 100)
    assert demand.load(A, 1.0).token_rate == pytest.approx(5)
    assert demand.load(A, 25.0).token_rate == pytest.approx(4)


def test_requests_that_run_count_though_they_began_before_the_window() -> None:
    """34 streams that began earlier were no evidence at all, so their model never left a full device."""
    demand = window()
    for second in range(200):
        model = model_report("a", num_started=34, decoded_tokens=500 * second, num_running=34)
        demand.on_report(report("worker-0", model), float(second))
    assert demand.load(A, 199.0).noise == pytest.approx(34**-0.5)
    ended = model_report("a", num_started=34, decoded_tokens=100_000)
    demand.on_report(report("worker-0", ended), 200.0)
    later = model_report("a", num_started=35, decoded_tokens=100_100, num_running=1)
    demand.on_report(report("worker-0", later), 300.0)
    assert demand.load(A, 300.0).noise == 1.0
