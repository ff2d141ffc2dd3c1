"""Figures mean what vLLM's mean."""

from __future__ import annotations

import pytest

from prism.bench import metrics
from prism.bench.outcomes import Failed, Refused, TimedOut
from prism.bench.targets import Objectives
from tests.bench.records import record, target


def test_fields_and_their_values() -> None:
    m = target()
    records = [record(m, 0.0, (0.1, 0.2, 0.4)), record(m, 1.0, (0.3,)), record(m, 2.0, (), Refused(429, ""))]
    found = metrics.summarise(records, 4.0, metrics.METRICS, (50.0, 99.9))
    expected = {
        "completed": 2,
        "failed": 1,
        "total_input_tokens": 20,
        "total_output_tokens": 4,
        "request_throughput": 0.5,
        "output_throughput": 1.0,
        "total_token_throughput": 6.0,
        "request_goodput": None,
        "mean_ttft_ms": 200.0,
        "median_ttft_ms": 200.0,
        "std_ttft_ms": 100.0,
        "mean_tpot_ms": 150.0,
        "mean_itl_ms": 150.0,
        "std_itl_ms": 50.0,
        "mean_e2el_ms": 350.0,
        "p50_e2el_ms": 350.0,
        "max_concurrent_requests": 1,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert {"p99.9_ttft_ms", "p99.9_tpot_ms", "p99.9_itl_ms"} <= set(found)


def test_one_token_has_no_time_per_output_token() -> None:
    found = metrics.summarise([record(target(), 0.0, (0.1,))], 1.0, ("tpot",), ())
    assert found["mean_tpot_ms"] == 0.0
    assert "mean_ttft_ms" not in found


def test_goodput_counts_what_met_every_objective() -> None:
    m = target(objectives=Objectives(ttft=0.1, tpot=0.1, e2el=1.0))
    records = [
        record(m, 0.0, (0.1, 0.19)),
        record(m, 0.0, (0.11, 0.19)),  # first token too late
        record(m, 0.0, (0.1, 0.3)),  # too slow then
        record(m, 0.0, (0.1, *(0.1 + 0.09 * i for i in range(1, 12)))),  # too long in all
        record(m, 0.0, (0.1,)),
        record(m, 0.0, (0.1, 0.19), Failed("lost")),
    ]
    found = metrics.summarise(records, 2.0, (), ())
    assert found["request_goodput"] == 1.0
    assert found["attainment"] == pytest.approx({"ttft": 4 / 6, "tpot": 4 / 6, "both": 3 / 6})


def test_models_have_their_own_objectives() -> None:
    fast, slow, free = target("a", Objectives(0.05)), target("b", Objectives(0.5)), target("c")
    records = [record(fast), record(slow), record(slow), record(free)]
    assert metrics.attainment(records) == pytest.approx({"ttft": 2 / 3, "tpot": None, "both": 2 / 3})
    assert metrics.attainment([record(free)]) == {"ttft": None, "tpot": None, "both": None}


def test_endings_add_up() -> None:
    outcomes = [None, Refused(429, "a"), Refused(429, "b"), Refused(503, ""), Failed("x"), TimedOut(1.0)]
    records = [record(target(), outcome=outcome) for outcome in outcomes]
    assert metrics.endings(records) == {
        "finished": 1,
        "refused": {"429": 2, "503": 1},
        "broken": {"x": 1},
        "timed_out": 1,
    }


def test_most_requests_at_a_time() -> None:
    m = target()
    spans = [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.2, 0.1)]
    assert metrics.max_concurrent([record(m, start, (length,)) for start, length in spans]) == 3


def test_lateness_is_what_the_client_adds() -> None:
    m = target()
    found = metrics.lateness([record(m, 1.0, at=0.99), record(m, 1.0, at=1.0005)])
    assert found["max_lateness_ms"] == pytest.approx(10.0)
    assert found["mean_lateness_ms"] == pytest.approx(5.0)
