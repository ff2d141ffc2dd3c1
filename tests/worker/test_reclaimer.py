"""Who may take which free slabs."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism.engine.scheduler import Want
from prism.messages import Activate
from prism.types import ModelId, Rank, RequestId
from prism.worker import reclaim
from prism.worker.models import Model
from prism.worker.reclaim import ReclaimDecision
from prism.worker.reclaimer import REFUSED_SECONDS, Reclaimer
from prism.worker.snapshot import MemorySnapshot, Need
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
    local.now += reclaim.MOST_PATIENCE
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


def test_sequences_use_what_weights_wait_for_that_could_not_come(tmp_path: Path) -> None:
    """All free memory was kept for a large model that an older stream of another was in the way of, for as
    long as that ran, and sequences of models that were there waited beside it.

    What goes on meanwhile does not keep the large one waiting when the stream has ended.
    """
    shape = {"max_position_embeddings": 4096}
    names = ("llama", "qwen3", "mistral")
    paths = {name: save(make_model(name, seed=i, **shape), tmp_path / name) for i, name in enumerate(names)}
    floor = {"memory": {"floor": 4 * SLAB}}
    local = LocalWorker(paths, num_slabs=6, model_options={"llama": floor})
    local.submit("old", "qwen3", prompts(1, 50)[0], max_tokens=600)
    local.submit("first", "mistral", [1, 2], max_tokens=2)
    local.run(until=lambda: ("first", 0) in local.outbox.finished)
    local.submit("large", "llama", [1, 2], max_tokens=2)
    local.now += reclaim.MOST_PATIENCE
    local.submit("small 0", "mistral", [1 + i % 50 for i in range(1600)], max_tokens=2)
    local.run(until=lambda: {("small 0", 0), ("old", 0)} & local.outbox.finished.keys())
    assert ("old", 0) not in local.outbox.finished, "the small model's request waited for it"
    assert local.worker.models["llama"].is_waiting_for_slabs
    end, count = None, 1
    while ("large", 0) not in local.outbox.finished:
        if (f"small {count - 1}", 0) in local.outbox.finished:
            local.submit(f"small {count}", "mistral", [1, 2], max_tokens=20)
            count += 1
        local.pump()
        end = local.now if end is None and ("old", 0) in local.outbox.finished else end
        assert end is None or local.now < end + local.worker.limits.min_residency + 0.2
    local.run()
    assert len(local.outbox.finished) == count + 3
    local.close()


def test_nobody_is_stopped_for_a_load_before_it_has_waited_in_proportion_to_what_that_costs(
    tmp_path: Path,
) -> None:
    """A device that was asked for more models than it held loaded them in turns and did little else."""
    shape = {"max_position_embeddings": 4096}
    names = ("llama", "qwen3")
    paths = {name: save(make_model(name, seed=i, **shape), tmp_path / name) for i, name in enumerate(names)}
    local = LocalWorker(paths, num_slabs=3, sections={"limits": {"min_residency": 0.01}})
    local.submit("young", "qwen3", prompts(1, 50)[0], max_tokens=1000)
    local.run(until=lambda: ("young", 0) in local.outbox.tokens)
    young = local.worker.models["qwen3"]
    now, local.now = local.now, local.now - 0.02
    local.submit("old", "llama", [1, 2], max_tokens=2)
    arrival = local.now
    waiting, costs = local.worker.models["llama"], local.worker.costs.of(ModelId("llama"))
    assert costs is not None
    due = arrival + reclaim.patience(costs.activation, local.worker.limits.max_wait)
    local.now = now + 0.01
    assert local.now < due - 0.02
    for _ in range(10):
        local.pump()
    assert waiting.is_waiting_for_slabs and young.engine is not None
    assert not young.num_evictions + young.engine.scheduler.num_preemptions
    local.now = due
    local.run(until=lambda: ("old", 0) in local.outbox.finished)
    assert young.num_evictions + young.engine.scheduler.num_preemptions >= 1
    assert ("young", 0) not in local.outbox.finished
    local.run(rounds=10**5)
    assert ("young", 0) in local.outbox.finished
    local.close()


def test_a_model_whose_requests_may_not_wait_for_long_is_loaded_all_the_same(tmp_path: Path) -> None:
    """Beside a busy model each of them was refused after `limits.max_wait`, before anybody was stopped."""
    shape = {"max_position_embeddings": 4096}
    names = ("llama", "qwen3")
    paths = {name: save(make_model(name, seed=i, **shape), tmp_path / name) for i, name in enumerate(names)}
    local = LocalWorker(paths, 3, sections={"limits": {"min_residency": 0.01, "max_wait": 0.2}})
    local.submit("busy", "qwen3", prompts(1, 50)[0], max_tokens=2000)
    local.run(until=lambda: ("busy", 0) in local.outbox.tokens)
    now, local.now = local.now, local.now - 0.02
    local.submit("old", "llama", [1, 2], max_tokens=2)
    local.now = now
    local.run(until=lambda: ("old", 0) in local.outbox.finished or "old" in local.outbox.rejected)
    assert not local.outbox.rejected and ("busy", 0) not in local.outbox.finished
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


def rank_at(arrival: float) -> Rank:
    return (arrival, RequestId(""), 0)


def two_models(tmp_path: Path) -> tuple[LocalWorker, Model, Model]:
    """One model with a young request, another with an older one and two slabs; no slab is free."""
    shape = {"max_position_embeddings": 4096}
    names = ("llama", "qwen3")
    paths = {name: save(make_model(name, seed=i, **shape), tmp_path / name) for i, name in enumerate(names)}
    local = LocalWorker(paths, num_slabs=5, host_kv=0)
    local.submit("older", "qwen3", [1 + i % 50 for i in range(1600)], max_tokens=500)
    local.run(until=lambda: ("older", 0) in local.outbox.tokens)
    local.now += 1.0
    local.submit("young", "llama", prompts(1, 20)[0], max_tokens=2000)
    local.run(until=lambda: ("young", 0) in local.outbox.tokens)
    mine, theirs = local.worker.models.values()
    assert mine.kv is not None and theirs.kv is not None
    assert (mine.kv.num_slabs, theirs.kv.num_slabs, local.device.pool.num_free) == (1, 2, 0)
    return local, mine, theirs


def test_an_old_sequence_is_not_held_up_by_a_young_one_that_runs_before_it(tmp_path: Path) -> None:
    """A young one that ran was refused memory, and the oldest of all, which waited behind it, did not ask."""
    local, mine, theirs = two_models(tmp_path)
    assert mine.kv is not None and theirs.engine is not None
    wants = [Want(rank_at(local.now), mine.kv.num_free + 1), Want(rank_at(0.0), 5)]
    local.worker.reclaimer.ensure_kv(mine, wants[:1], local.now)
    assert not theirs.engine.scheduler.num_preemptions, "it is older"
    local.worker.reclaimer.ensure_kv(mine, wants, local.now)
    assert mine.kv.num_free >= sum(want.num_blocks for want in wants)
    assert theirs.engine.scheduler.num_preemptions == 1
    local.close()


def test_nobody_is_asked_for_more_than_a_limit_lets_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a sequence lacked was taken from others, and what passed its model's limit went unused."""
    local, mine, _ = two_models(tmp_path)
    assert mine.kv is not None
    needs: list[Need] = []

    def decide(snapshot: MemorySnapshot, need: Need, now: float) -> tuple[ReclaimDecision, ...]:
        needs.append(need)
        return ()

    monkeypatch.setattr(reclaim, "decide", decide)
    mine.kv_limit = 2
    wants = [Want(rank_at(0.0), mine.kv.num_free + 3 * mine.kv.layout.blocks_per_slab)]
    local.worker.reclaimer.ensure_kv(mine, wants, local.now)
    assert [need.slabs for need in needs] == [1]
    local.close()


def test_what_one_model_is_refused_does_not_put_off_another() -> None:
    """There was one time for all: a model that was refused again and again kept the others from asking."""
    asked: list[str] = []

    def snapshot(expected_demand: float, now: float) -> MemorySnapshot:
        asked.append(f"{now:.2f}")
        return MemorySnapshot(0, (), (), 2.0)

    holdings: Any = SimpleNamespace(rank=None, snapshot=snapshot)
    nothing: Any = SimpleNamespace(pool=None)
    reclaimer = Reclaimer(nothing, {}, holdings, nothing, nothing)

    def ask(name: str, slabs: int, now: float) -> None:
        model: Any = SimpleNamespace(name=ModelId(name))
        need = Need(model.name, slabs, rank_at(1.0), for_weights=False)
        assert not reclaimer._give(model, need, now)

    ask("a", 1, 0.0)
    ask("a", 1, 0.01)
    assert asked == ["0.00"]
    ask("b", 1, 0.04)
    ask("a", 1, REFUSED_SECONDS)
    assert asked == ["0.00", "0.04", "0.05"]


def test_nothing_is_kept_for_a_model_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    """It had found no room before its only request was cancelled; what a command loads waited for it."""
    names = ("llama", "qwen3", "mistral")
    paths = {name: save(make_model(name, seed=i), tmp_path / name) for i, name in enumerate(names)}
    floor = {"memory": {"floor": 4 * SLAB}}
    local = LocalWorker(paths, num_slabs=6, model_options={"llama": floor})
    local.submit("running", "qwen3", prompts(1, 50)[0], max_tokens=300)
    local.run(until=lambda: ("running", 0) in local.outbox.tokens)
    local.submit("large", "llama", [1, 2], max_tokens=2)
    local.pump()
    local.cancel("large")
    small = local.worker.models["mistral"]
    local.worker.on_command(Activate(epoch=1, command_id=1, model="mistral"))
    local.run(until=lambda: small.is_active or ("running", 0) in local.outbox.finished)
    assert small.is_active
    local.close()


def test_a_model_at_its_limit_drops_its_cache_some_blocks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody's memory was looked at for each block; now once for many while the cache is large."""
    local = LocalWorker(
        {"llama": save(make_model("llama", max_position_embeddings=4096), tmp_path)}, num_slabs=8
    )
    model = local.worker.models["llama"]
    model.kv_limit = 2
    looks: list[Need] = []
    decide = reclaim.decide

    def noted(snapshot: MemorySnapshot, need: Need, now: float) -> tuple[ReclaimDecision, ...]:
        looks.append(need)
        return decide(snapshot, need, now)

    monkeypatch.setattr(reclaim, "decide", noted)
    for number in range(5):
        local.submit(f"old {number}", "llama", [number] * 1200, max_tokens=1)
        local.run()
    kv = model.kv
    assert kv is not None and kv.num_slabs == 2
    cached, spare = kv.num_cached, kv.num_free
    looks.clear()
    local.submit("long", "llama", [99], max_tokens=1600)
    local.run()
    wanted, at_once = 100 - spare, cached // reclaim.CACHE_SHARE
    assert wanted > 2 * at_once > 60, "or there is nothing to see"
    assert len(looks) <= 1 + wanted // (at_once - at_once // reclaim.CACHE_SHARE)
    assert kv.num_slabs == 2 and kv.num_cached >= cached - wanted - at_once
    local.close()
