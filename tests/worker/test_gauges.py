from __future__ import annotations

from pathlib import Path

from prism.metrics import Metrics
from prism.worker.gauges import Gauges
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import LocalWorker


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
