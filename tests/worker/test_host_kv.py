"""KV that loses its place on the device waits in host memory, and is found there bit by bit as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from prism.engine.engine import Engine
from prism.messages import Evict
from prism.metrics import Metrics
from prism.types import MiB, Stamp
from prism.weights.client import PackedWeights, pack_here
from prism.weights.protocol import WeightSource
from prism.worker import host_kv
from prism.worker.cost_book import Expected
from prism.worker.gauges import Gauges
from prism.worker.lanes import Lane
from prism.worker.models import Model
from prism.worker.reports import make_report
from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.late import LateBackend
from tests.support.local_worker import SLAB, InlineChunks, LocalWorker

SEEDS = {"llama": 0, "qwen2": 3, "qwen3": 4}
LIMITED = {"llama": {"memory": {"limit": SLAB}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: make_model(family, seed=seed) for family, seed in SEEDS.items()}
    return {family: (model, save(model, folder / family)) for family, model in made.items()}


@pytest.fixture(params=["at once", "late"])
def start(models: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Workers whose copies have run when they are queued, and those whose copies run as late as they may."""
    workers: list[LocalWorker] = []

    def make(*families: str, num_slabs: int = 3, **options: Any) -> LocalWorker:
        paths = {family: models[family][1] for family in families}
        backend = LateBackend() if request.param == "late" else None
        workers.append(LocalWorker(paths, num_slabs, backend=backend, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def model(local: LocalWorker, name: str) -> Model:
    return local.worker.models[name]


def engine(local: LocalWorker, name: str) -> Engine:
    found = model(local, name).engine
    assert found is not None
    return found


def counts(local: LocalWorker, name: str) -> tuple[int, int]:
    return local.worker.host.counts(model(local, name).name)


def evict(local: LocalWorker, name: str) -> None:
    """The model goes, and all that was its is overwritten."""
    local.worker.on_command(Evict(epoch=1, command_id=1, model=name))
    local.run()
    assert not model(local, name).is_active
    local.poison()


# --- eviction and return ---------------------------------------------------------------------------


def test_a_conversation_goes_on_from_its_cached_prefix(models: dict, start: Any) -> None:
    """Room for all weights, but not for any KV: each turn finds its model evicted and its past kept."""
    local = start("llama", "qwen2", "qwen3")
    history = {family: prompts(1, 200, seed=i)[0] for i, family in enumerate(SEEDS)}
    known = dict.fromkeys(SEEDS, 0)
    for turn in range(4):
        for family in SEEDS:
            name, prompt = f"{family}{turn}", history[family]
            local.submit(name, family, prompt, max_tokens=20)
            local.run()
            answer = reference(models[family][0], prompt, 20)
            assert local.outbox.tokens[name, 0] == answer
            assert local.outbox.started[name].cached_tokens == min(known[family], len(prompt) - 1) // 16 * 16
            known[family] = len(prompt) + len(answer) - 1  # the last token's KV is computed by nobody
            history[family] = prompt + answer + [turn]
            local.poison()
    assert min(model(local, family).num_activations for family in SEEDS) >= 2
    assert all(counts(local, family)[1] > 0 for family in SEEDS)


def test_fetched_blocks_are_equal_bit_by_bit(start: Any) -> None:
    local = start("llama", num_slabs=6)
    prompt = prompts(1, 2, seed=1)[0] * 100 + prompts(1, 300, seed=2)[0]

    def blocks() -> torch.Tensor:
        """Of the prompt's whole blocks, in their order."""
        runner, kv = engine(local, "llama").runner, model(local, "llama").kv
        assert kv is not None
        (sequence,) = engine(local, "llama").scheduler.running
        found = torch.tensor(sequence.blocks[: (len(prompt) - 1) // 16])
        return runner.kv.pages[found].clone()

    contents = []
    for name in ("first", "second"):
        local.submit(name, "llama", prompt, max_tokens=8)
        local.run(until=lambda name=name: len(local.outbox.tokens.get((name, 0), [])) > 2)
        contents.append(blocks())
        local.run()
        if name == "first":
            evict(local, "llama")
    assert local.outbox.started["second"].cached_tokens == (len(prompt) - 1) // 16 * 16 > 100
    assert torch.equal(contents[0].view(torch.int32), contents[1].view(torch.int32))


def test_what_runs_when_its_model_is_evicted_goes_on(models: dict, start: Any) -> None:
    """A sequence that is set aside, output and all, computes again what is left of its last block at most."""
    local = start("llama", "qwen2", num_slabs=3)
    prompt = prompts(1, 200, seed=5)[0]
    local.submit("r", "llama", prompt, max_tokens=150)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), [])) > 70)
    local.worker.evict(model(local, "llama"))
    local.poison()
    num_known = len(prompt) + len(local.outbox.tokens["r", 0]) - 1
    local.run()
    assert local.outbox.tokens["r", 0] == reference(models["llama"][0], prompt, 150)
    assert counts(local, "llama")[1] == num_known // 16


def test_copies_name_the_slabs_they_read(models: dict, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbour may not have a slab before the copy has left it: the lane's stamp would be too early."""
    local = start("llama", "qwen2", num_slabs=3)
    if not isinstance(local.device.backend, LateBackend):
        pytest.skip("copies have run when they are queued")

    def lanes_own(self: Lane) -> Stamp:
        return Stamp(local.device.lanes[0].lane_id, local.device.lanes[0].num_queued)

    prompt = prompts(1, 300, seed=6)[0]
    answers = []
    for is_wrong in (False, True):
        with monkeypatch.context() as patch:
            if is_wrong:
                local.worker.host.blocks.forget(model(local, "llama").name)
                patch.setattr(type(local.device.swap), "stamp", lanes_own)
            local.submit(f"a{is_wrong}", "llama", prompt, max_tokens=4)
            local.run()
            local.submit(f"b{is_wrong}", "qwen2", prompt, max_tokens=4)
            local.run()
        local.submit(f"c{is_wrong}", "llama", prompt, max_tokens=60)
        local.run()
        answers.append(local.outbox.tokens[f"c{is_wrong}", 0])
    expected = reference(models["llama"][0], prompt, 60)
    assert answers[0] == expected
    assert answers[1] != expected, "a test that cannot fail"


# --- under pressure --------------------------------------------------------------------------------


@pytest.mark.parametrize("host_kv", [2 * SLAB, 16 * SLAB])
def test_preempted_sequences_are_not_computed_again(host_kv: int, models: dict, start: Any) -> None:
    """More sequences than their KV has room for: the youngest wait in host memory, as far as there is any."""
    local = start("llama", model_options=LIMITED, host_kv=host_kv)
    many = prompts(40, 200, seed=7)
    for i, prompt in enumerate(many):
        local.submit(str(i), "llama", prompt)
    local.run(until=lambda: local.poison() or not len(local.worker.requests))
    assert engine(local, "llama").scheduler.num_preemptions > 0 and counts(local, "llama")[1] > 0
    for i, prompt in enumerate(many):
        assert local.outbox.tokens[str(i), 0] == reference(models["llama"][0], prompt, 64)


def test_cache_is_dropped_before_anybody_is_preempted(start: Any) -> None:
    """Sequences were preempted although the prefix cache had blocks to give."""
    local = start("llama", model_options=LIMITED)
    for i, prompt in enumerate(prompts(12, 300, seed=8)):
        local.submit(str(i), "llama", prompt, max_tokens=2)
        local.run()
    kv = model(local, "llama").kv
    assert kv is not None and kv.num_cached > 8
    scheduler = engine(local, "llama").scheduler
    blocks = kv.allocate(kv.num_free) or []
    local.submit("r", "llama", [1, 2, 3], max_tokens=40)
    kv.release(blocks[:1])
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), [])) > 2)
    local.worker.reclaimer.ensure_kv = lambda *_: None  # type: ignore[method-assign]  # it comes too late
    local.run()
    assert scheduler.num_preemptions == 0 and local.outbox.finished["r", 0] == "length"
    kv.release(blocks[1:])


def test_neighbours_take_cached_slabs_and_the_cache_is_found_again(models: dict, start: Any) -> None:
    local = start("llama", "qwen2", num_slabs=7)
    fill = prompts(40, 400, seed=11)
    for i, prompt in enumerate(fill):
        local.submit(f"fill{i}", "llama", prompt, max_tokens=2)
        local.run()
    kv = model(local, "llama").kv
    assert kv is not None and kv.num_slabs >= 3
    for i, prompt in enumerate(prompts(30, 400, seed=13)):
        local.submit(f"b{i}", "qwen2", prompt, max_tokens=40)
    local.run(until=lambda: local.poison() or not len(local.worker.requests))
    assert kv.num_slabs < 3 and counts(local, "llama")[0] > 0
    before = engine(local, "llama").scheduler.num_prefix_hits
    for i, prompt in enumerate(fill[:5]):
        local.submit(f"again{i}", "llama", prompt, max_tokens=20)
        local.run()
        assert local.outbox.tokens[f"again{i}", 0] == reference(models["llama"][0], prompt, 20)
    computed = sum(map(len, fill[:5])) - (engine(local, "llama").scheduler.num_prefix_hits - before)
    assert (
        counts(local, "llama")[1] > 0 and computed < 5 * 3 * 16
    )  # a block or two while slabs were on their way


def test_blocks_that_move_make_way_in_order(models: dict, start: Any) -> None:
    """Moved blocks are written where dropped ones are: those have been saved before."""
    local = start("llama", num_slabs=8)
    fill = [[i, i + 1] * 104 for i in range(20)]
    for i, prompt in enumerate(fill):
        local.submit(f"fill{i}", "llama", prompt, max_tokens=1)
        local.run()
    for i in range(4):
        local.submit(f"long{i}", "llama", [i] * 400, max_tokens=100)
    local.run(until=lambda: all(len(local.outbox.tokens.get((f"long{i}", 0), [])) > 50 for i in range(4)))
    kv, reclaimer = model(local, "llama").kv, local.worker.reclaimer
    assert kv is not None
    moves: list[Any] = []
    move_blocks = local.device.move_blocks
    local.device.move_blocks = lambda *args: (moves.extend(args[2]), move_blocks(*args))  # type: ignore[method-assign,assign,return-value]
    while not moves:
        assert reclaimer._release_slabs(model(local, "llama"), 1) == 1
    assert len(moves) > 20 and counts(local, "llama")[0] > 100
    local.run()
    local.poison()
    for i in range(4):
        assert local.outbox.tokens[f"long{i}", 0] == reference(models["llama"][0], [i] * 400, 100)
    for i, prompt in enumerate(fill):
        local.submit(f"again{i}", "llama", prompt, max_tokens=20)
        local.run()
        assert local.outbox.tokens[f"again{i}", 0] == reference(models["llama"][0], prompt, 20)
    assert counts(local, "llama")[1] > 100


def test_blocks_are_fetched_behind_the_copies_that_save_them(models: dict, start: Any) -> None:
    """They are wanted again while they are still on their way out."""
    local = start("llama", num_slabs=4)
    prompt = prompts(1, 2, seed=1)[0] * 100 + [1, 2, 3] * 40
    local.submit("first", "llama", prompt, max_tokens=1)
    local.run()
    kv = model(local, "llama").kv
    assert kv is not None and kv.num_cached > 10
    local.worker.reclaimer._release_slabs(model(local, "llama"), 1)
    assert kv.num_cached == 0
    local.submit("second", "llama", prompt, max_tokens=20)
    local.run()
    assert local.outbox.started["second"].cached_tokens == (len(prompt) - 1) // 16 * 16
    assert local.outbox.tokens["second", 0] == reference(models["llama"][0], prompt, 20)


# --- budget and cost -------------------------------------------------------------------------------


def test_the_budget_keeps_what_was_used_last(models: dict, start: Any) -> None:
    local = start("llama", num_slabs=10, host_kv=SLAB)
    kept = prompts(1, 2, seed=30)[0] * 150
    for i in range(60):
        local.submit(f"old{i}", "llama", [i, i + 1] * 200, max_tokens=2)
        local.run()
    local.submit("kept", "llama", kept, max_tokens=2)
    local.run()
    evict(local, "llama")
    report = make_report(local.worker, local.now)
    assert 0 < report.models[0].kv_host_bytes <= report.kv_host_bytes == SLAB
    local.submit("again", "llama", kept, max_tokens=20)
    local.run()
    assert local.outbox.started["again"].cached_tokens == (len(kept) - 1) // 16 * 16
    assert local.outbox.tokens["again", 0] == reference(models["llama"][0], kept, 20)
    local.submit("lost", "llama", [0, 1] * 200, max_tokens=2)
    local.run()
    assert local.outbox.started["lost"].cached_tokens == 0


def test_no_budget_means_recomputing(models: dict, start: Any) -> None:
    local = start("llama", host_kv=0)
    prompt = prompts(1, 300, seed=31)[0]
    for name in ("first", "second"):
        local.submit(name, "llama", prompt, max_tokens=20)
        local.run()
        assert local.outbox.tokens[name, 0] == reference(models["llama"][0], prompt, 20)
        assert local.outbox.started[name].cached_tokens == 0
        evict(local, "llama")
    assert counts(local, "llama") == (0, 0)


@pytest.mark.parametrize("fail_at", [0, 1])
def test_host_memory_that_does_not_come_is_said_once(
    fail_at: int, models: dict, start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What has been taken is used; without any, everything is computed again."""
    caplog.set_level(logging.ERROR)
    local = start("llama", num_slabs=10, chunks=InlineChunks(64 * MiB, fail_at))
    many = prompts(40, 400, seed=32)
    for turn in range(2):
        for i, prompt in enumerate(many):
            local.submit(f"{turn}.{i}", "llama", prompt, max_tokens=3)
        local.run()
        for i, prompt in enumerate(many):
            assert local.outbox.tokens[f"{turn}.{i}", 0] == reference(models["llama"][0], prompt, 3)
        evict(local, "llama")
    report = make_report(local.worker, local.now)
    assert report.kv_host_bytes == fail_at * SLAB and (counts(local, "llama")[1] > 0) == (fail_at > 0)
    assert report.kv_host_error is not None and "injected" in report.kv_host_error
    assert len([record for record in caplog.records if "no more host memory" in record.message]) == 1


@pytest.mark.parametrize(("link", "is_saved", "is_fetched"), [(1e12, True, True), (1.0, False, False)])
def test_what_is_quicker_is_done(link: float, is_saved: bool, is_fetched: bool, start: Any) -> None:
    local = start("llama")
    local.worker.host.saving.value = local.worker.host.fetching.value = link
    prompt = prompts(1, 300, seed=33)[0]
    for name in ("first", "second"):
        local.submit(name, "llama", prompt, max_tokens=2)
        local.run()
        evict(local, "llama")
    saved, fetched = counts(local, "llama")
    assert (saved > 0, fetched > 0) == (is_saved, is_fetched)


def test_what_got_dearer_to_fetch_than_to_compute_stays_there(start: Any) -> None:
    local = start("llama")
    prompt = prompts(1, 300, seed=34)[0]
    local.submit("first", "llama", prompt, max_tokens=2)
    local.run()
    evict(local, "llama")
    local.worker.host.fetching.value = 1.0
    local.submit("second", "llama", prompt, max_tokens=2)
    local.run()
    assert counts(local, "llama")[0] > 0 and counts(local, "llama")[1] == 0
    assert local.outbox.started["second"].cached_tokens == 0


def test_an_eviction_waits_for_so_many_copies_and_no_more(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slabs are wanted by somebody: the most recent blocks are saved, as far as the link gets in time."""
    local = start("llama", num_slabs=10)
    for i in range(30):
        local.submit(str(i), "llama", [i, i + 1] * 200, max_tokens=1)
        local.run()
    kv = model(local, "llama").kv
    assert kv is not None
    monkeypatch.setattr(
        host_kv, "SAVE_SECONDS", 40.5 * kv.layout.block_bytes / local.worker.host.saving.value
    )
    evict(local, "llama")
    assert counts(local, "llama")[0] == 40
    local.submit("last", "llama", [29, 30] * 200, max_tokens=1)
    local.run()
    assert local.outbox.started["last"].cached_tokens > 0


def test_blocks_are_worth_what_steps_take(start: Any) -> None:
    local = start("llama")
    local.submit("first", "llama", [1], max_tokens=1)
    local.run()
    host, name = local.worker.host, model(local, "llama").name
    before = host.costs(host._members[name]).compute
    for _ in range(50):
        local.worker.costs.ran(name, Expected("prompt", 600, 0.001, 0.0), 0.005)
    assert host.costs(host._members[name]).compute > 2 * before > 0


# --- never stale -----------------------------------------------------------------------------------


def test_other_weights_find_nothing(models: dict, start: Any, tmp_path: Path) -> None:
    """A checkpoint that was replaced while its model was away was served with the old one's KV."""
    local = start("llama")
    prompt = prompts(1, 300, seed=35)[0]
    local.submit("old", "llama", prompt, max_tokens=20)
    local.run()
    evict(local, "llama")
    other = make_model("llama", seed=77)
    path = save(other, tmp_path / "other")

    def fetch(name: str) -> PackedWeights:
        return pack_here(WeightSource(model=model(local, "llama").name, path=str(path)))

    local.fetch = fetch
    local.submit("new", "llama", prompt, max_tokens=20)
    local.run()
    assert local.outbox.started["new"].cached_tokens == 0
    assert local.outbox.tokens["new", 0] == reference(other, prompt, 20)
    evict(local, "llama")
    local.submit("again", "llama", prompt, max_tokens=20)
    local.run()
    assert local.outbox.started["again"].cached_tokens == (len(prompt) - 1) // 16 * 16
    assert local.outbox.tokens["again", 0] == reference(other, prompt, 20)


# --- what is told ----------------------------------------------------------------------------------


def test_metrics_and_reports_tell_of_it(start: Any) -> None:
    local = start("llama")
    metrics = Metrics()
    gauges = Gauges(metrics, "worker-0")
    prompt = prompts(1, 2, seed=1)[0] * 100
    for name in ("first", "second"):
        local.submit(name, "llama", prompt, max_tokens=1)
        local.run()
        evict(local, "llama")
    gauges.update(local.worker)
    text = metrics.text().decode()
    size = model(local, "llama").profile.kv.block_bytes  # type: ignore[union-attr]
    assert 'prism:kv_blocks_saved_total{model_name="llama"} 6.0' in text
    assert 'prism:kv_blocks_fetched_total{model_name="llama"} 6.0' in text
    assert f'prism:kv_host_bytes{{model_name="llama"}} {float(6 * size)}' in text
    assert make_report(local.worker, local.now).models[0].kv_host_bytes == 6 * size
