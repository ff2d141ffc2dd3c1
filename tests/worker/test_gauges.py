from __future__ import annotations

import json
from pathlib import Path

import pytest

from prism.calibration.learnt import Key, read_counts
from prism.metrics import Metrics
from prism.profile import parse_profile
from prism.worker.gauges import Gauges
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import LocalWorker
from tests.test_profile import RAW


def value(text: str, series: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(series))


def test_metrics_follow_the_worker(tmp_path: Path) -> None:
    local = LocalWorker({"m": save(make_model("llama"), tmp_path / "m")}, 8)
    metrics = Metrics()
    gauges = Gauges(metrics, "worker-0")
    for name in ("first", "second"):
        local.submit(name, "m", [5] * 40, max_tokens=3)
        local.run()
        gauges.update(local.worker)
    text = metrics.text().decode()
    assert value(text, 'prism:activations_total{model_name="m"}') == 1
    assert value(text, 'prism:activation_seconds_count{model_name="m"}') == 1
    assert value(text, 'prism:prefix_cache_queries_total{model_name="m"}') == 80
    assert value(text, 'prism:prefix_cache_hits_total{model_name="m"}') == 32
    assert value(text, 'prism:slabs{model="m",owner="weights",worker="worker-0"}') == 1
    assert value(text, 'prism:slabs{model="",owner="free",worker="worker-0"}') == local.device.pool.num_free
    assert value(text, 'prism:steps_total{kind="prompt",model_name="m"}') == 2
    assert value(text, 'prism:step_tokens_total{kind="prompt",model_name="m"}') == 48
    assert value(text, 'prism:step_tokens_total{kind="decode",model_name="m"}') == 4
    assert (
        value(text, 'prism:step_seconds_total{kind="decode",model_name="m"}') == 0
    )  # by a clock that stands
    assert value(text, 'prism:step_predicted_seconds_total{kind="decode",model_name="m"}') > 0
    local.close()
    gauges.update(local.worker)
    assert value(metrics.text().decode(), 'prism:evictions_total{model_name="m"}') == 1


def test_what_a_profile_is_compared_with(tmp_path: Path) -> None:
    """From a worker's metrics to a profile, as `prism profile --from-server` goes."""
    base = parse_profile(json.dumps(RAW), "test")
    path = save(make_model("llama"), tmp_path / "m")
    known = {"small": base.costs("small")}
    local = LocalWorker({"small": path, "unknown": path}, 16, calibrated=known)
    metrics = Metrics()
    gauges = Gauges(metrics, "worker-0")
    for name in ("small", "unknown"):
        local.submit(name, name, [5] * 40, max_tokens=30)
    local.run()
    gauges.update(local.worker)
    gauges.update(local.worker)
    counts = read_counts(metrics.text().decode(), "here")
    digest = base.costs("small").digest
    assert {key.kind: seen.count for key, seen in counts.items()} == {"decode": 29, "prompt": 1, "load": 0}
    assert {key[::2] for key in counts} == {("small", digest)}
    decodes = counts[Key("small", "decode", digest)]
    assert decodes.predicted == pytest.approx(29 * 0.001, rel=0.01) and decodes.seconds == 0
    local.close()
