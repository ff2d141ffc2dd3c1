"""Who may take which free slabs."""

from __future__ import annotations

from pathlib import Path

from tests.support.checkpoints import make_model, prompts, save
from tests.support.local_worker import SLAB, LocalWorker


def test_a_small_model_does_not_take_what_an_older_large_one_waits_for(tmp_path: Path) -> None:
    """Small models that came later took the slabs, one after the other, and the large one was refused."""
    paths = {
        name: save(make_model(name, seed=i), tmp_path / name)
        for i, name in enumerate(("llama", "qwen3", "mistral"))
    }
    floor = {"memory": {"floor": 4 * SLAB}}
    local = LocalWorker(paths, num_slabs=6, model_options={"llama": floor})
    models = local.worker.models
    local.submit("running", "qwen3", prompts(1, 50)[0], max_tokens=200)
    local.run(until=lambda: ("running", 0) in local.outbox.tokens)
    local.submit("large", "llama", [1, 2], max_tokens=2)
    local.submit("small", "mistral", [1, 2], max_tokens=2)
    for _ in range(100):
        local.pump()
    assert ("running", 0) not in local.outbox.finished
    assert local.device.pool.num_free >= 2, "there is room for the small model"
    assert models["mistral"].is_waiting_for_slabs and models["llama"].is_waiting_for_slabs
    local.run(until=lambda: ("large", 0) in local.outbox.finished)
    assert ("small", 0) not in local.outbox.finished
    local.run()
    assert ("small", 0) in local.outbox.finished
    local.close()
