"""Whatever the worker does with memory, greedy tokens equal those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from prism.memory.host import HostDriver
from tests.support.cached_blocks import CachedBlocks
from tests.support.checkpoints import FAMILIES, make_model, prompts, reference, save
from tests.support.late import LateBackend
from tests.support.local_worker import LocalWorker

NUM_TOKENS = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: make_model(family, seed=i) for i, family in enumerate(FAMILIES)}
    return {family: (model, save(model, folder / family)) for family, model in made.items()}


@pytest.fixture(params=["at once", "late"])
def start(
    models: dict[str, tuple[PreTrainedModel, Path]], request: pytest.FixtureRequest
) -> Iterator[object]:
    """Workers whose steps have run when they are queued, and those with steps on their way on two lanes."""
    workers: list[LocalWorker] = []

    def make(*families: str, num_slabs: int = 16, **options: object) -> LocalWorker:
        paths = {family: models[family][1] for family in families}
        backend = LateBackend() if request.param == "late" else None
        workers.append(LocalWorker(paths, num_slabs, backend=backend, **options))  # type: ignore[arg-type]
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_request(family: str, models: dict, start: object) -> None:
    local = start(family)  # type: ignore[operator]
    prompt = prompts(1, 60)[0]
    local.submit("r", family, prompt)
    local.run()
    expected = reference(models[family][0], prompt, NUM_TOKENS)
    assert local.outbox.tokens["r", 0] == expected
    assert local.outbox.finished["r", 0] == "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_mixed_requests_in_chunks(family: str, models: dict, start: object) -> None:
    local = start(family, max_batch_tokens=48)  # type: ignore[operator]
    many = prompts(16, 200)
    for i, prompt in enumerate(many):
        local.submit(str(i), family, prompt)
    local.run()
    expected = [reference(models[family][0], prompt, NUM_TOKENS) for prompt in many]
    assert len({token for tokens in expected for token in tokens}) >= 32
    assert [local.outbox.tokens[str(i), 0] for i in range(16)] == expected


def test_prefix_hits(models: dict, start: object) -> None:
    local = start("llama")  # type: ignore[operator]
    prompt = prompts(1, 2, seed=5)[0] * 100
    for name, tail in (("first", [1, 2]), ("second", [3, 4])):
        local.submit(name, "llama", prompt + tail)
        local.run()
        expected = reference(models["llama"][0], prompt + tail, NUM_TOKENS)
        assert local.outbox.tokens[name, 0] == expected
    assert local.outbox.started["first"].cached_tokens == 0
    assert local.outbox.started["second"].cached_tokens == 96


def test_choices_share_their_prompt(models: dict, start: object) -> None:
    local = start("qwen2")  # type: ignore[operator]
    prompt = prompts(1, 100)[0]
    local.submit("r", "qwen2", prompt, n=3)
    local.run()
    expected = reference(models["qwen2"][0], prompt, NUM_TOKENS)
    assert [local.outbox.tokens["r", i] for i in range(3)] == [expected] * 3


def test_preemption(models: dict, start: object) -> None:
    """More sequences than their KV has room for: the youngest give way and are recomputed."""
    local = start("llama", num_slabs=3, model_options={"llama": {"memory": {"limit": "2MiB"}}})  # type: ignore[operator]
    many = prompts(40, 200, seed=7)
    for i, prompt in enumerate(many):
        local.submit(str(i), "llama", prompt)
    local.run()
    engine = local.worker.models["llama"].engine
    assert engine is not None and engine.scheduler.num_preemptions > 0
    for i, prompt in enumerate(many):
        assert local.outbox.tokens[str(i), 0] == reference(models["llama"][0], prompt, NUM_TOKENS)


def test_eviction_in_the_middle_of_a_conversation(models: dict, start: object) -> None:
    """Room for all weights, but not for any KV: each turn finds its model evicted and brings it back."""
    local = start("llama", "qwen2", "qwen3", num_slabs=3)  # type: ignore[operator]
    history = {family: prompts(1, 40, seed=i)[0] for i, family in enumerate(("llama", "qwen2", "qwen3"))}
    for turn in range(3):
        for family in history:
            name = f"{family}{turn}"
            local.submit(name, family, history[family], max_tokens=20)
            local.run()
            expected = reference(models[family][0], history[family], 20)
            assert local.outbox.tokens[name, 0] == expected
            history[family] = history[family] + expected + [turn]
            local.poison()
    activations = [local.worker.models[family].num_activations for family in history]
    assert min(activations) >= 2


def test_busy_models_take_turns(models: dict, start: object) -> None:
    """Weights of all do not fit together and nobody is idle: running requests are set aside and go on."""
    local = start("llama", "qwen2", "qwen3", num_slabs=3)  # type: ignore[operator]
    expected = {}
    for i, prompt in enumerate(prompts(12, 60, seed=9)):
        family = ("llama", "qwen2", "qwen3")[i % 3]
        local.submit(str(i), family, prompt, max_tokens=60)
        expected[str(i)] = reference(models[family][0], prompt, 60)
    local.run()
    assert not local.outbox.rejected
    assert {name: local.outbox.tokens[name, 0] for name in expected} == expected


def test_memory_moves_while_its_former_owner_decodes(models: dict, start: object) -> None:
    """B takes slabs that A's prefix cache held, while A is decoding; both answers stay right."""
    local = start("llama", "qwen2", num_slabs=7)  # type: ignore[operator]
    for i, prompt in enumerate(prompts(60, 400, seed=11)):
        local.submit(f"fill{i}", "llama", prompt, max_tokens=2)
    local.run()
    kv = local.worker.models["llama"].kv
    assert kv is not None and kv.num_slabs >= 3
    held = kv.num_slabs
    long = prompts(1, 30, seed=12)[0]
    local.submit("a", "llama", long, max_tokens=400)
    local.run(until=lambda: len(local.outbox.tokens.get(("a", 0), [])) > 20)
    local.poison()
    for i, prompt in enumerate(prompts(30, 400, seed=13)):
        local.submit(f"b{i}", "qwen2", prompt, max_tokens=40)
    blocks = CachedBlocks(local, every=20)

    def look() -> bool:
        blocks.look()
        return kv.num_slabs < held

    local.run(until=look)
    local.poison()
    assert ("a", 0) not in local.outbox.finished
    local.run(until=lambda: look() and not len(local.worker.requests))
    assert blocks.num_checked > 1000
    assert local.outbox.tokens["a", 0] == reference(models["llama"][0], long, 400)
    for i, prompt in enumerate(prompts(30, 400, seed=13)):
        assert local.outbox.tokens[f"b{i}", 0] == reference(models["qwen2"][0], prompt, 40)


def test_memory_that_changes_its_owner_is_not_mapped_anew(
    start: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in everybody's window: no call of the driver, which would make steps of others wait."""
    local = start("llama", "qwen2", num_slabs=7)  # type: ignore[operator]
    local.submit("b", "qwen2", prompts(1, 30, seed=10)[0], max_tokens=2)
    for i, prompt in enumerate(prompts(60, 400, seed=11)):
        local.submit(f"fill{i}", "llama", prompt, max_tokens=2)
    local.run()
    kv = local.worker.models["llama"].kv
    assert kv is not None and local.worker.models["qwen2"].is_active
    held, calls = kv.num_slabs, []
    for name in ("create", "release", "map", "unmap", "reserve", "unreserve"):
        monkeypatch.setattr(HostDriver, name, lambda *_, name=name: calls.append(name))
    for i, prompt in enumerate(prompts(30, 400, seed=13)):
        local.submit(f"b{i}", "qwen2", prompt, max_tokens=40)
    local.run()
    assert kv.num_slabs < held and local.worker.models["llama"].is_active
    assert not calls
    monkeypatch.undo()


def test_a_block_that_is_written_while_cached_shows(start: object) -> None:
    local = start("llama")  # type: ignore[operator]
    local.submit("r", "llama", prompts(1, 200)[0], max_tokens=4)
    local.run()
    model, blocks = local.worker.models["llama"], CachedBlocks(local)
    blocks.look()
    blocks.look()
    assert blocks.num_checked == model.kv.num_cached > 0
    place = next(iter(model.kv._published.values())).place
    model.engine.runner.kv.pages[place, 0, 0, 0, 0, :1] += 1
    with pytest.raises(AssertionError, match="was written while cached"):
        blocks.look()


@pytest.mark.parametrize("fault", ["zero a block", "drop a position"])
def test_a_broken_cache_shows(fault: str, models: dict, start: object) -> None:
    """The tests above can fail: damage to one live block, or one position too few, changes the answer."""
    local = start("llama")  # type: ignore[operator]
    prompt = prompts(1, 2, seed=3)[0] * 3 + prompts(1, 60, seed=4)[0]
    local.submit("r", "llama", prompt)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), [])) == 5)
    engine = local.worker.models["llama"].engine
    assert engine is not None
    (sequence,) = engine.scheduler.running
    if fault == "zero a block":
        engine.runner.kv.pages[sequence.blocks[0]].zero_()
    else:
        sequence.num_computed -= 1
        del sequence.tokens[len(prompt) - 2]
        sequence.prompt_len -= 1
        local.check = lambda: None  # it may see the damage first
    local.run()
    assert local.outbox.tokens["r", 0] != reference(models["llama"][0], prompt, NUM_TOKENS)


def test_later_choices_find_the_prompt_in_the_cache(start: object, models: dict) -> None:
    """Every choice computed the prompt anew, since it counted as computed as soon as its step was queued."""
    local = start("llama")  # type: ignore[operator]
    local.submit("r", "llama", prompts(1, 200, seed=4)[0] + [1] * 200, max_tokens=4, n=8)
    local.run()
    assert local.worker.models["llama"].engine.scheduler.num_prefix_hits > 1000


def test_choices_that_wait_for_a_place_do_not_sleep(start: object) -> None:
    """A model with a step on its way was put to sleep for seconds: 40 s instead of a moment."""
    local = start("llama", max_batch_size=2)  # type: ignore[operator]
    begin = local.now
    local.submit("r", "llama", [1, 2, 3], max_tokens=20, n=3, logprobs=2)
    local.run()
    assert local.now - begin < 1
