from __future__ import annotations

from pathlib import Path

from prism.types import ModelId
from prism.worker.views import admission_snapshot
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
