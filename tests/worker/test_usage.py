"""What the controller is told of the load."""

from __future__ import annotations

from pathlib import Path

from prism.worker.reports import make_report
from prism.worker.usage import DeviceTime
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
