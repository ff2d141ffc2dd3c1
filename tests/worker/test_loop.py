"""The worker's loop: ends, limits, failures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.errors import NotHeld
from prism.memory.failing import FailingDriver
from prism.memory.host import HostDriver
from prism.messages import Activate, Evict, ResumedChoice, SetLimits
from prism.types import Bytes, ModelId, ModelState
from prism.weights.client import PackedWeights
from prism.worker.standstill import STANDSTILL_SECONDS, Standstill
from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.local_worker import GATEWAY, SLAB, LocalWorker


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name, seed=i), folder / name) for i, name in enumerate(("llama", "qwen3"))}


@pytest.fixture
def start(paths: dict[str, Path]) -> Iterator[Any]:
    workers: list[LocalWorker] = []

    def make(*names: str, num_slabs: int = 8, **options: Any) -> LocalWorker:
        workers.append(LocalWorker({name: paths[name] for name in names}, num_slabs, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def code(local: LocalWorker, request_id: str) -> tuple[int, str | None]:
    error = local.outbox.rejected[request_id].error
    return error.status, error.param


def test_unknown_model_and_too_long_prompts_are_refused_at_once(start: Any) -> None:
    local = start("llama")
    local.submit("a", "nothing", [1])
    local.submit("first", "llama", [1], max_tokens=1)
    local.submit("b", "llama", [1] * 512)
    local.submit("c", "llama", [1] * 500, max_tokens=20)
    local.submit("d", "llama", [1, 99999])
    assert code(local, "a") == (404, "model")
    assert code(local, "b") == (400, "prompt")
    assert code(local, "c") == (400, "max_tokens")
    assert code(local, "d") == (400, "prompt")
    local.run()


def test_default_max_tokens_shrinks_to_what_memory_holds(start: Any) -> None:
    local = start("llama", num_slabs=2)
    local.worker.models["llama"].kv_limit = 1
    local.submit("warm", "llama", [1], max_tokens=1)
    local.run()
    local.submit("r", "llama", [1] * 500, max_tokens=10**6, clip_max_tokens=True)
    local.run()
    assert local.outbox.finished["r", 0] == "length"
    assert len(local.outbox.tokens["r", 0]) == 12


def test_a_full_queue_refuses_with_a_time(start: Any) -> None:
    local = start("llama")
    local.worker.limits = local.worker.limits.model_copy(update={"max_queue": 3})
    for i in range(5):
        local.submit(str(i), "llama", [1], max_tokens=2)
    assert set(local.outbox.rejected) == {"3", "4"}
    error = local.outbox.rejected["3"].error
    assert error.status == 429 and error.retry_after is not None
    local.run()
    assert len(local.outbox.finished) == 3


def test_waiting_has_an_end(start: Any) -> None:
    """The weights never come: the request ends all the same."""
    local = start("llama")
    local.submit("r", "llama", [1])
    local.outbox.wanted.clear()
    local.now += local.worker.limits.max_wait
    local.pump()
    assert code(local, "r") == (429, None)
    local.worker.on_packed("llama")


def test_cancel_frees_everything_but_the_cache(start: Any) -> None:
    local = start("llama")
    local.submit("r", "llama", prompts(1, 90)[0], n=2)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 1), [])) > 3)
    local.cancel("r", choice=0)
    local.run(until=lambda: len(local.outbox.tokens["r", 1]) > 10)
    local.cancel("r")
    kv = local.worker.models["llama"].kv
    assert kv is not None and kv.num_used == 0
    assert len(local.worker.requests) == 0
    assert not local.outbox.finished


def test_a_gateway_that_ends_takes_its_requests_along(start: Any) -> None:
    local = start("llama")
    for i in range(4):
        local.submit(str(i), "llama", [i + 1] * 5)
    local.run(until=lambda: len(local.outbox.tokens) == 4)
    local.worker.on_gateway_ended(GATEWAY)
    assert len(local.worker.requests) == 0
    assert local.worker.advance() is False


def test_resumed_tokens_continue_the_text(start: Any, paths: dict[str, Path]) -> None:
    model = make_model("llama", seed=0)
    prompt = prompts(1, 50)[0]
    whole = reference(model, prompt, 64)
    local = start("llama")
    resumed = [ResumedChoice(choice=0, token_ids=whole[:20], finished=False)]
    local.outbox.tokens["r", 0] = list(whole[:20])
    local.submit("r", "llama", prompt, resumed=resumed, attempt=1)
    local.run()
    assert local.outbox.tokens["r", 0] == whole


def test_resumed_requests_are_past_the_longest_wait(start: Any) -> None:
    """A stream of more than max_wait, resubmitted after its worker had died, was refused with 429."""
    local = start("llama")
    local.now += 1
    local.outbox.tokens["r", 0] = [5, 6]
    resumed = [ResumedChoice(choice=0, token_ids=[5, 6], finished=False)]
    local.submit("r", "llama", [1, 2, 3], resumed=resumed, attempt=1, max_tokens=4)
    local.now += local.worker.limits.max_wait + 10
    local.run()
    assert local.outbox.finished["r", 0] == "length"


def test_an_idle_model_holds_one_slab_beyond_its_cache(start: Any) -> None:
    local = start("llama", num_slabs=12)
    for i, prompt in enumerate(prompts(60, 300, seed=3)):
        local.submit(str(i), "llama", prompt, max_tokens=20)
    local.run()
    kv = local.worker.models["llama"].kv
    assert kv is not None
    cached = kv.num_cached * kv.layout.block_bytes
    assert kv.num_slabs * SLAB <= -(-cached // SLAB) * SLAB + SLAB


def test_a_suspect_runs_alone(start: Any) -> None:
    local = start("llama", "qwen3")
    local.submit("warm", "llama", [1], max_tokens=1)
    local.run()
    local.submit("before", "qwen3", [1, 2], max_tokens=30)
    local.run(until=lambda: ("before", 0) in local.outbox.tokens)
    local.submit("suspect", "llama", [3, 4], alone=True, max_tokens=30)
    local.submit("after", "qwen3", [5, 6], max_tokens=5)
    local.run(until=lambda: ("suspect", 0) in local.outbox.tokens)
    assert ("before", 0) in local.outbox.finished
    assert ("after", 0) not in local.outbox.tokens
    local.run()
    assert {("suspect", 0), ("after", 0)} <= set(local.outbox.finished)


def test_commands_load_and_evict(start: Any) -> None:
    local = start("llama", "qwen3")
    local.worker.on_command(Activate(epoch=5, command_id=1, model="llama", pinned=True))
    local.run()
    assert local.worker.models["llama"].state is ModelState.ACTIVE
    local.worker.on_command(Evict(epoch=4, command_id=2, model="llama"))
    assert local.worker.models["llama"].state is ModelState.ACTIVE  # an earlier controller's
    local.worker.on_command(Evict(epoch=5, command_id=3, model="llama"))
    local.run()
    assert local.worker.models["llama"].state is ModelState.COLD
    local.worker.on_command(Evict(epoch=5, command_id=4, model="nothing"))
    assert [(d.command_id, d.error is None) for d in local.outbox.done] == [(1, True), (3, True), (4, False)]


def test_an_eviction_that_is_not_to_wait_returns_what_runs(start: Any, paths: dict[str, Path]) -> None:
    """What was drawn has been sent, and another attempt goes on behind it, without a tear."""
    model, prompt = make_model("llama", seed=0), [1, 2, 3]
    local = start("llama")
    local.submit("r", "llama", prompt, max_tokens=30)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), [])) > 5)
    local.submit("waits", "llama", prompt, max_tokens=30)
    local.worker.on_command(Evict(epoch=1, command_id=1, model="llama"))
    assert local.outbox.done[0].conflicts and "unfinished" in (local.outbox.done[0].error or "")
    local.worker.models["llama"].pinned = True
    local.worker.on_command(Evict(epoch=1, command_id=2, model="llama", returns=True, moved=True))
    local.run()
    assert not local.worker.models["llama"].pinned, "memory would be kept for it here"
    assert sorted(local.outbox.returned) == ["r", "waits"]
    assert local.worker.models["llama"].state is ModelState.COLD and local.outbox.done[1].error is None
    so_far = local.outbox.tokens["r", 0]
    assert so_far == reference(model, prompt, 30)[: len(so_far)] and 5 < len(so_far) < 30
    resumed = [ResumedChoice(choice=0, token_ids=so_far, finished=False)]
    local.submit("r", "llama", prompt, max_tokens=30, resumed=resumed, attempt=1)
    local.run()
    assert local.outbox.tokens["r", 0] == reference(model, prompt, 30)


def test_a_load_that_is_not_wanted_any_more_returns_who_waits_for_it(start: Any) -> None:
    local = start("llama")
    local.submit("r", "llama", [1, 2, 3])
    local.worker.on_command(Evict(epoch=1, command_id=1, model="llama", returns=True))
    local.run()
    assert local.outbox.returned == ["r"]
    assert local.worker.models["llama"].state is ModelState.COLD


def test_a_checkpoint_that_cannot_be_packed_fails_its_requests_only(start: Any) -> None:
    local = start("llama", "qwen3")
    local.submit("bad", "llama", [1])
    local.submit("good", "qwen3", [1], max_tokens=3)
    local.outbox.wanted.remove("llama")
    local.worker.on_packing_failed("llama", "model.safetensors: lm_head.weight: truncated")
    local.run()
    error = local.outbox.rejected["bad"].error
    assert error.status == 503 and "lm_head.weight" in error.message
    assert local.outbox.finished["good", 0] == "length"
    local.submit("again", "llama", [1], max_tokens=2)
    assert local.outbox.rejected["again"].error.status == 503
    local.now += 60
    local.submit("later", "llama", [1], max_tokens=2)
    local.run()
    assert local.outbox.finished["later", 0] == "length"


def test_weights_that_the_store_let_go_are_packed_again(start: Any) -> None:
    """A model that waited for slabs until the store had evicted its weights failed with its requests."""
    local = start("llama")
    fetch, calls = local.fetch, []

    def forgetful(model: ModelId) -> PackedWeights:
        calls.append(model)
        if len(calls) == 1:
            raise NotHeld("llama: the weight store does not hold it")
        return fetch(model)

    local.fetch = forgetful
    local.submit("r", "llama", [1, 2], max_tokens=3)
    local.run()
    assert local.outbox.finished["r", 0] == "length"
    assert len(calls) == 2


def test_any_driver_call_may_fail(start: Any) -> None:
    """For every n: the nth driver call fails while two models take turns. Each request ends once."""
    expected = {
        name: reference(make_model(name, seed=i), [7, 8, 9], 8) for i, name in enumerate(("llama", "qwen3"))
    }
    num_calls = 0
    for n in range(1, 200):
        driver = FailingDriver(HostDriver(Bytes(2 * SLAB)))
        local = start("llama", "qwen3", num_slabs=2, driver=driver)
        base = driver.faults.num_calls
        driver.faults.fail_next(n)
        for i in range(6):
            local.submit(str(i), ("llama", "qwen3")[i % 2], [7, 8, 9], max_tokens=8)
            local.run()
        for i in range(6):
            right = local.outbox.tokens.get((str(i), 0)) == expected[("llama", "qwen3")[i % 2]]
            refused = str(i) in local.outbox.rejected
            assert right != refused, (n, i)
            if refused:
                assert local.outbox.rejected[str(i)].error.status == 503
        num_calls = driver.faults.num_calls - base
        if num_calls < n:
            break
    else:
        raise AssertionError("more calls than were tried")
    assert num_calls > 10


def test_the_first_request_of_a_model_is_checked_like_the_others(start: Any) -> None:
    """A prompt that memory can never hold was let in while the model's shape had not been read yet."""
    local = start("llama", num_slabs=2)
    local.worker.models["llama"].kv_limit = 0  # room for no token
    local.submit("r", "llama", [1] * 500)
    assert code(local, "r") == (400, "prompt")
    assert not local.outbox.wanted


def test_a_model_larger_than_the_device_evicts_nobody(start: Any) -> None:
    """It was packed, took the place of every idle model and was then refused with 429."""
    local = start("llama", "qwen3", num_slabs=4)
    local.submit("warm", "qwen3", [1], max_tokens=1)
    local.run()
    local.worker.on_command(
        SetLimits(epoch=1, command_id=1, model="llama", kv_floor_bytes=4 * SLAB, kv_limit_bytes=None)
    )
    local.worker.on_command(Activate(epoch=1, command_id=2, model="llama"))
    local.submit("r", "llama", [1])
    local.run()
    assert code(local, "r") == (503, None)
    assert [done.error is None for done in local.outbox.done] == [True, False]
    assert local.worker.models["qwen3"].is_active


def set_floor(local: LocalWorker, model: str, slabs: int) -> None:
    local.worker.on_command(
        SetLimits(epoch=1, command_id=1, model=model, kv_floor_bytes=slabs * SLAB, kv_limit_bytes=None)
    )


def test_a_floor_for_which_a_waiting_model_finds_no_device_ends_its_requests(start: Any) -> None:
    """A started request waited for slabs that do not exist, and everybody younger waited behind it."""
    local = start("llama", "qwen3", num_slabs=4)
    local.submit("old", "llama", [1, 2], max_tokens=200)
    local.run(until=lambda: ("old", 0) in local.outbox.tokens)
    local.worker.evict(local.worker.models["llama"])
    local.run(until=lambda: local.worker.models["llama"].state is ModelState.FETCHING)
    set_floor(local, "llama", 4)
    local.submit("young", "qwen3", [1], max_tokens=3)
    local.run(until=lambda: ("young", 0) in local.outbox.finished)
    assert code(local, "old") == (503, None)
    assert "the device has 4" in local.outbox.rejected["old"].error.message


def test_a_model_that_failed_by_its_floor_is_tried_again_when_that_is_lowered(start: Any) -> None:
    """Its requests were refused until its next try was due, up to half a minute."""
    local = start("llama", num_slabs=4)
    set_floor(local, "llama", 4)
    for name in ("a", "b", "c"):
        local.submit(name, "llama", [1], max_tokens=1)
        local.pump()
        assert code(local, name) == (503, None)
        local.now = max(local.now, local.worker.models["llama"].retry_at)
    local.submit("d", "llama", [1], max_tokens=1)
    local.pump()
    set_floor(local, "llama", 0)
    local.submit("e", "llama", [1], max_tokens=1)
    local.run()
    assert ("e", 0) in local.outbox.finished


def test_a_stalled_model_is_tried_again_when_others_may_be_evicted(tmp_path: Path) -> None:
    """It waited until the younger request that had taken its cache was done, however long that took."""
    paths = {
        name: save(make_model(name, seed=i, max_position_embeddings=8192), tmp_path / name)
        for i, name in enumerate(("llama", "qwen3"))
    }
    local = LocalWorker(paths, num_slabs=4)
    local.submit("warm-1", "llama", [1], max_tokens=1)
    local.submit("warm-2", "qwen3", [1], max_tokens=1)
    local.run()
    local.submit("old", "llama", [1 + i % 500 for i in range(6000)], max_tokens=2)
    local.submit("young", "qwen3", prompts(1, 100)[0], max_tokens=500)
    local.run(until=lambda: ("young", 0) in local.outbox.tokens)
    assert ("old", 0) not in local.outbox.tokens
    local.now += local.worker.limits.min_residency
    local.run(until=lambda: ("old", 0) in local.outbox.finished)
    assert ("young", 0) not in local.outbox.finished
    local.run()
    local.close()


def test_running_work_gives_way_only_to_older_requests(start: Any) -> None:
    """A sequence that was older than the need lost its blocks because a younger one waited behind it."""
    local = start("llama")
    local.submit("old", "llama", prompts(1, 100)[0])
    local.run(until=lambda: ("old", 0) in local.outbox.tokens)
    local.submit("young", "llama", prompts(1, 100)[0])
    local.pump()
    model = local.worker.models["llama"]
    assert model.engine is not None
    assert [s.request_id for s in model.engine.scheduler.running] == ["old", "young"]
    model.engine.scheduler.preempt_youngest(1)
    held = local.worker.holdings.snapshot(0.0, local.now).holdings[0]
    assert [sequence.rank[1] for sequence in held.running] == ["old"]
    local.run()


def test_a_lower_limit_takes_the_cache_at_once(start: Any) -> None:
    """Slabs past a new limit stayed with the model until its next request ended, and longer."""
    local = start("llama", num_slabs=8)
    for i, prompt in enumerate(prompts(60, 300, seed=3)):
        local.submit(str(i), "llama", prompt, max_tokens=20)
    local.run()
    kv = local.worker.models["llama"].kv
    assert kv is not None and kv.num_slabs > 1
    local.worker.on_command(
        SetLimits(epoch=1, command_id=1, model="llama", kv_floor_bytes=0, kv_limit_bytes=SLAB)
    )
    assert kv.num_slabs == 1
    local.check()


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context takes more than one slab of KV."""
    model = make_model("llama", num_key_value_heads=4, max_position_embeddings=4096, num_hidden_layers=4)
    return save(model, tmp_path_factory.mktemp("long") / "model")


def lower_limit(local: LocalWorker) -> int:
    """Leaves model m one slab of KV; returns the tokens that it holds."""
    local.worker.on_command(
        SetLimits(epoch=1, command_id=1, model="m", kv_floor_bytes=0, kv_limit_bytes=SLAB)
    )
    capacity = local.worker.max_len(local.worker.models["m"])
    assert capacity is not None and capacity < 2000, "the tests want a context of more than one slab"
    return capacity


def test_a_limit_below_what_runs_ends_it_with_an_error(long_context: Path) -> None:
    """The request waited for room that could not come, until limits.request_timeout."""
    local = LocalWorker({"m": long_context}, 8)
    local.submit("long", "m", [5] * 2000, max_tokens=400)
    local.submit("short", "m", [1, 2, 3], max_tokens=5)
    local.run(until=lambda: ("long", 0) in local.outbox.tokens)
    capacity = lower_limit(local)
    error = local.outbox.rejected["long"].error
    assert error.status == 503 and str(capacity) in error.message
    local.run()
    assert local.outbox.finished["short", 0] == "length"
    local.close()


def test_a_lower_limit_bounds_what_goes_on(long_context: Path) -> None:
    local = LocalWorker({"m": long_context}, 8)
    local.submit("r", "m", [5] * 1000, max_tokens=1000)
    local.run(until=lambda: ("r", 0) in local.outbox.tokens)
    capacity = lower_limit(local)
    local.run()
    assert local.outbox.finished["r", 0] == "length"
    assert 1000 + len(local.outbox.tokens["r", 0]) == capacity
    local.close()


def test_a_pinned_model_is_loaded_again_after_a_failure(start: Any, paths: dict[str, Path]) -> None:
    """Only a request would have brought it back."""
    local = start("llama", model_options={"llama": {"pinned": True}})
    local.pump()
    local.outbox.wanted.clear()
    local.worker.on_packing_failed("llama", "no host memory")
    model = local.worker.models["llama"]
    assert model.state is ModelState.FAILED
    timer = local.worker.next_timer()
    assert timer is not None and timer <= local.now + 2
    local.now = timer
    local.run()
    assert model.state is ModelState.ACTIVE  # type: ignore[comparison-overlap]


def test_a_packing_that_failed_too_late_changes_nothing(start: Any) -> None:
    """A model that had been unloaded meanwhile, or was active, became a failed one."""
    local = start("llama", "qwen3")
    local.submit("r", "llama", [1, 2], max_tokens=30)
    local.run(until=lambda: ("r", 0) in local.outbox.tokens)
    for name in ("llama", "qwen3"):
        local.worker.on_packing_failed(name, "no host memory")
    assert local.worker.models["llama"].is_active
    assert local.worker.models["qwen3"].state is ModelState.COLD
    local.run()
    assert local.outbox.finished["r", 0] == "length"


def test_a_dropped_choice_gives_its_slabs_back(start: Any) -> None:
    """Those past a lowered limit stayed with the model until the request's last choice had ended."""
    local = start("llama", num_slabs=8, max_batch_size=64)
    local.submit("r", "llama", prompts(1, 90)[0], n=48, max_tokens=300)
    local.run(until=lambda: all(len(local.outbox.tokens.get(("r", c), [])) > 250 for c in range(48)))
    kv = local.worker.models["llama"].kv
    assert kv is not None
    local.worker.on_command(
        SetLimits(epoch=1, command_id=1, model="llama", kv_floor_bytes=0, kv_limit_bytes=SLAB)
    )
    assert kv.num_slabs > 3
    for choice in range(1, 48):
        local.cancel("r", choice)
    assert kv.num_slabs == 1
    local.run()


def test_a_standstill_is_ended_and_told(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever brings it about: here a sequence that waits for a token which no step draws."""
    local = start("llama")
    prompt = prompts(1, 20)[0]
    local.submit("r", "llama", prompt, max_tokens=24)
    local.run(until=lambda: len(local.outbox.tokens.get(("r", 0), [])) >= 5)
    engine = local.worker.models["llama"].engine
    assert engine is not None
    engine.scheduler.preempt_youngest(1)
    (sequence,) = engine.scheduler.waiting
    sequence.num_pending = 1
    began = local.now
    local.run()
    assert local.outbox.tokens["r", 0] == reference(make_model("llama"), prompt, 24)
    assert local.now - began >= STANDSTILL_SECONDS and "nothing moves" in caplog.text
    assert local.worker.models["llama"].num_evictions == 1


def test_what_moved_meanwhile_is_no_standstill() -> None:
    """A prompt of many steps draws nothing: behind it all looked as it had before it."""
    standstill = Standstill()
    assert not standstill.lasts("as it is", 0.0)
    standstill.ended(STANDSTILL_SECONDS)
    assert not standstill.lasts("as it is", STANDSTILL_SECONDS + 1)
    assert standstill.lasts("as it is", 2 * STANDSTILL_SECONDS + 1)


def test_waiting_for_a_load_is_no_standstill(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    local = start("llama", "qwen3")
    local.submit("r", "llama", prompts(1, 20)[0], max_tokens=200)
    local.run(until=lambda: ("r", 0) in local.outbox.tokens)
    for _ in range(20):
        local.now += STANDSTILL_SECONDS
        local.pump()
    local.run()
    assert ("r", 0) in local.outbox.finished and "nothing moves" not in caplog.text
