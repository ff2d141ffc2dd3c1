"""What the controller is told of the load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism.messages import WAITS
from prism.types import Slo
from prism.worker.reports import make_report
from prism.worker.usage import DeviceTime, Usage
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import LocalWorker


def test_steps_that_run_side_by_side_share_the_time() -> None:
    time = DeviceTime()
    parts = [time.ended(begin, now) for begin, now in ((0, 3), (1, 4), (6, 8), (7, 7.5))]
    assert parts == [3, 1, 2, 0]


def test_reports_count_tokens_of_requests_that_started(tmp_path: Path) -> None:
    local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 8)
    for name in ("first", "second"):
        local.submit(name, "m", [5] * 40, max_tokens=3)
        local.run()
    (report,) = make_report(local.worker, local.now).models
    assert (report.prompt_tokens, report.decoded_tokens) == (80, 6)
    local.close()


def test_reports_count_first_tokens_that_are_late_for_want_of_the_device(tmp_path: Path) -> None:
    """Not those that waited for a load, nor those that could not have been in time at all."""
    local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 8)

    def num_late(name: str, ttft: float, waits: float, n: int = 1) -> int:
        local.submit(name, "m", [5] * 40, max_tokens=2, n=n, slo=Slo(ttft, 1.0))
        local.now += waits
        local.run()
        (report,) = make_report(local.worker, local.now).models
        return report.num_late

    assert num_late("cold", 1.0, waits=1.5) == 0
    assert num_late("in time", 1.0, waits=0.5) == 0
    assert num_late("late", 1.0, waits=1.5) == 1
    assert num_late("hopeless", 1e-9, waits=1.5) == 1
    assert num_late("refused", 1.0, waits=local.worker.limits.max_wait + 1) == 2
    assert "refused" in local.outbox.rejected
    assert num_late("four choices, drawn in one step", 1.0, waits=1.5, n=4) == 3
    local.close()


def test_a_stream_needs_the_device_at_the_pace_of_its_objective() -> None:
    """However much sooner its steps come, one after the other or beside those of others."""
    for gap, share in ((0.01, 1.0), (0.02, 0.5), (0.049, 0.25)):
        usage = Usage()
        for step in range(1, 1001):
            usage.ran(0.01 * share, 0.01, step * gap, 0.05)
        seconds = 1000 * gap
        assert usage.device_seconds == pytest.approx(10 * share)
        assert usage.needed_seconds / seconds == pytest.approx(0.01 * share / 0.05, rel=0.01)


def test_late_steps_and_prompts_are_needed_in_full() -> None:
    usage = Usage()
    usage.ran(0.01, 0.01, 1.0, None)  # prompts
    usage.ran(0.01, 0.01, 1.07, 0.05)  # late
    assert usage.needed_seconds == pytest.approx(0.02)
    usage.ran(0.01, 0.01, 1.08, float("inf"))  # for nobody
    assert usage.needed_seconds == pytest.approx(0.02)


def test_what_others_would_have_waited_for_is_counted() -> None:
    usage = Usage()
    for length in (0.003, 0.02):
        usage.ran(0.0, length, 1.0, None)
    beyond = [max(0.0, 0.003 - wait) + max(0.0, 0.02 - wait) for wait in WAITS]
    assert usage.blocked_seconds == pytest.approx(beyond)


def shares_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *objectives: float) -> tuple[float, float]:
    """Of the time of steps of 10 ms for a stream of each objective, what is needed; and of the first ones."""
    local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 8)
    local.submit("warm", "m", [5] * 4, max_tokens=1)
    local.run()
    engine = local.worker.models["m"].engine
    assert engine is not None
    run = engine.run

    def slow(*args: Any, **options: Any) -> Any:
        local.now += 0.009
        return run(*args, **options)

    monkeypatch.setattr(engine, "run", slow)
    for name, tpot in enumerate(objectives):
        local.submit(str(name), "m", [5] * 4, max_tokens=40, slo=Slo(2.0, tpot))
    (before,) = make_report(local.worker, local.now).models
    local.run()
    (after,) = make_report(local.worker, local.now).models
    local.close()
    return after.needed_seconds - before.needed_seconds, after.device_seconds - before.device_seconds


def test_the_tightest_objective_of_a_batch_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps every 10 ms or so: an objective of 100 ms needs a tenth of them, one of 20 ms half."""
    loose, busy = shares_of(tmp_path, monkeypatch, 0.1)
    both, same = shares_of(tmp_path, monkeypatch, 0.1, 0.02)
    assert busy == pytest.approx(same, rel=0.1)
    assert 0.08 * busy < loose < 0.2 * busy
    assert 0.4 * busy < both < 0.6 * busy
