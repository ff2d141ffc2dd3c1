from __future__ import annotations

from pathlib import Path

import pytest

from prism.types import ModelId
from prism.worker import views
from prism.worker.reports import make_report
from prism.worker.views import admission_snapshot, estimate
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import LocalWorker

LLAMA = ModelId("llama")


def test_choices_share_their_prompt_before_they_start_too(tmp_path: Path) -> None:
    """Until the first had computed it each counted the whole prompt as memory that it would take."""
    path = save(make_model("llama", seed=0, max_position_embeddings=2048), tmp_path / "llama")
    local = LocalWorker({"llama": path}, num_slabs=6, host_kv=0, max_batch_tokens=64)
    local.submit("r", "llama", [1 + i % 50 for i in range(800)], max_tokens=20, n=4)
    local.run(until=lambda: "r" in local.outbox.started)
    model = local.worker.models["llama"]
    assert model.engine is not None and model.kv is not None
    assert len(model.engine.scheduler.waiting) == 3
    load = admission_snapshot(local.worker).models[LLAMA]
    assert load.num_blocks_to_come + model.kv.num_used == 51 + 3, (
        "a prompt and the first choice's output, three more"
    )
    local.run()
    local.close()


def test_a_report_counts_the_queue_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each model: that took 31 ms where 10,000 requests waited for 16 models."""
    path = save(make_model("llama", seed=0), tmp_path / "llama")
    local = LocalWorker(dict.fromkeys(("a", "b", "c"), path), num_slabs=12, host_kv=0, max_batch_size=1)
    for number in range(9):
        local.submit(f"r{number}", "abc"[number % 3], [1, 2, 3], max_tokens=20)
    local.run(until=lambda: len(local.outbox.started) == 3)
    before = {m.model: m.estimated_wait for m in make_report(local.worker, local.now).models}
    models = local.worker.models.values()
    assert before == {m.name: estimate(local.worker, m, float("inf")).seconds for m in models}
    looks = []
    monkeypatch.setattr(views, "_stretch", lambda *_: looks.append(1) or 1.0)
    make_report(local.worker, local.now)
    assert len(looks) == 1
