"""Who may take which free slabs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("num_slabs", [4, 5])
@pytest.mark.parametrize("are_equal", [False, True], ids=["one after the other", "at once"])
def test_two_models_do_not_take_memory_from_each_other_in_turns(
    tmp_path: Path, num_slabs: int, are_equal: bool
) -> None:
    """A model asked with the rank of its oldest request, whoever lacked memory: 124 preemptions."""
    shape = {"max_position_embeddings": 4096}
    names = ("llama", "qwen3")
    paths = {name: save(make_model(name, seed=i, **shape), tmp_path / name) for i, name in enumerate(names)}
    local = LocalWorker(paths, num_slabs, host_kv=0)
    rng = random.Random(0)
    for i in range(10):
        model, length, outputs = rng.choice(names), rng.randint(500, 1400), rng.randint(5, 40)
        local.now -= 0.001 * are_equal
        local.submit(f"r{i}", model, prompts(1, length, seed=i)[0], max_tokens=outputs)
    local.run(rounds=300)
    assert len(local.outbox.finished) == 10
    engines = [model.engine for model in local.worker.models.values()]
    assert sum(engine.scheduler.num_preemptions for engine in engines if engine is not None) <= 10
    local.close()


def test_nobody_gives_way_to_weights_that_do_not_fit_all_the_same(tmp_path: Path) -> None:
    """All that was younger gave way to a model for which an older one left too little, at each attempt."""
    names = ("llama", "qwen3", "mistral")
    paths = {name: save(make_model(name, seed=i), tmp_path / name) for i, name in enumerate(names)}
    floor = {"memory": {"floor": 4 * SLAB}}
    local = LocalWorker(paths, num_slabs=6, model_options={"mistral": floor})
    local.submit("old", "llama", prompts(1, 50)[0], max_tokens=300)
    local.now += 1.0
    local.submit("young", "qwen3", prompts(1, 50)[0], max_tokens=400)
    local.run(until=lambda: ("young", 0) in local.outbox.tokens)
    local.now -= 0.5
    local.submit("large", "mistral", [1, 2], max_tokens=2)
    local.now += 0.5 + local.worker.limits.min_residency
    local.run(until=lambda: ("old", 0) in local.outbox.finished)
    young = local.worker.models["qwen3"]
    assert young.engine is not None and not young.engine.scheduler.num_preemptions and not young.num_evictions
    local.run()
    assert len(local.outbox.finished) == 3
    local.close()
