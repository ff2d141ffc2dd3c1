"""Models that come into free memory before anybody asks, and leave when somebody needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.errors import NotHeld
from prism.messages import Activate, Evict, Homes
from prism.types import Bytes, ModelState
from prism.weights.transfers import NEVER
from prism.worker.models import Model
from prism.worker.reports import make_report
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import SLAB, LocalWorker

A, B = "llama", "qwen3"
PROMPT = [7, 8, 9]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name, seed=i), folder / name) for i, name in enumerate((A, B))}


@pytest.fixture
def start(paths: dict[str, Path]) -> Iterator[Any]:
    workers: list[LocalWorker] = []

    def make(num_slabs: int, *homes: str, held: tuple[str, ...] = (A, B), **options: Any) -> LocalWorker:
        """Two models of two slabs each."""
        local = LocalWorker(paths, num_slabs, **options)
        workers.append(local)
        for name in held:
            local.worker.on_held(name, Bytes(1))
        local.worker.on_homes(Homes(epoch=1, models=list(homes)))
        return local

    yield make
    for worker in workers:
        worker.worker.on_homes(Homes(epoch=1, models=[]))
        worker.close()


def model(local: LocalWorker, name: str) -> Model:
    return local.worker.models[name]


def states(local: LocalWorker) -> tuple[ModelState, ModelState]:
    return model(local, A).state, model(local, B).state


def settle(local: LocalWorker) -> None:
    """All that comes by itself."""
    for _ in range(12):
        local.pump()
        local.now += 0.5


def begin(local: LocalWorker, name: str) -> None:
    """Until its load has been started."""
    for _ in range(10):
        if model(local, name).load is not None:
            return
        for wanted in local.outbox.wanted:
            local.worker.on_packed(wanted)
        local.outbox.wanted.clear()
        local.worker.advance()
        local.now += 0.1
    raise AssertionError("the load does not begin")


def test_what_lives_here_comes_and_its_first_request_waits_for_nothing(start: Any) -> None:
    local = start(12, A, B)
    settle(local)
    assert states(local) == (ModelState.ACTIVE, ModelState.ACTIVE)
    assert all(each.is_ahead for each in make_report(local.worker, local.now).models)
    local.submit("r", A, PROMPT, max_tokens=2)
    local.run()
    assert [each.is_ahead for each in make_report(local.worker, local.now).models] == [False, True]
    assert model(local, A).num_activations == 1


@pytest.mark.parametrize(
    ("homes", "held", "options"),
    [
        ((B,), (A, B), {}),
        ((A, B), (B,), {}),
        ((A, B), (A, B), {"scheduling": {"load_ahead": False}}),
        ((A, B), (A, B), {"scheduling": {"mode": "timeshare"}}),
    ],
)
def test_what_lives_elsewhere_is_not_packed_or_is_not_wanted_so_stays_away(
    start: Any, homes: tuple[str, ...], held: tuple[str, ...], options: dict[str, Any]
) -> None:
    local = start(12, *homes, held=held, **options)
    settle(local)
    assert model(local, A).state is ModelState.COLD


def test_nobody_is_evicted_for_what_nobody_asked_for(start: Any) -> None:
    local = start(3, A, B)
    local.submit("r", A, PROMPT, max_tokens=2)
    local.run()
    settle(local)
    assert states(local) == (ModelState.ACTIVE, ModelState.COLD)
    assert model(local, A).num_evictions == 0


def test_its_load_is_called_off_when_somebody_lacks_memory(start: Any) -> None:
    local = start(3, A)
    begin(local, A)
    load = model(local, A).load
    assert load is not None and load.deadline == NEVER, "whoever is waited for has the link first"
    local.submit("r", B, PROMPT, max_tokens=2)
    for _ in range(3):
        local.worker.advance()
        for wanted in local.outbox.wanted:
            local.worker.on_packed(wanted)
        local.outbox.wanted.clear()
    assert load.is_cancelled
    local.run()
    assert local.outbox.finished[("r", 0)] == "length"
    assert model(local, A).num_activations == 0


def test_it_leaves_for_what_somebody_asks_for(start: Any) -> None:
    local = start(3, A, model_options={B: {"memory": {"floor": 2 * SLAB}}})
    settle(local)
    assert model(local, A).is_active
    local.submit("r", B, PROMPT, max_tokens=2)
    local.run()
    assert local.outbox.finished[("r", 0)] == "length" and not model(local, A).is_active


def test_a_request_makes_its_load_urgent(start: Any) -> None:
    local = start(12, A)
    begin(local, A)
    local.submit("r", A, PROMPT, max_tokens=2)
    arrived = local.now
    local.worker.advance()
    load = model(local, A).load
    assert load is not None and load.deadline == arrived + 2.0 and not model(local, A).is_ahead
    local.run()
    assert model(local, A).last_used >= arrived and model(local, A).num_activations == 1


def test_it_leaves_when_it_lives_elsewhere(start: Any) -> None:
    local = start(12, A, B)
    settle(local)
    local.submit("r", B, PROMPT, max_tokens=2)
    local.run()
    local.worker.on_homes(Homes(epoch=1, models=[]))
    settle(local)
    assert states(local) == (ModelState.COLD, ModelState.ACTIVE), "what is in use is the controller's to move"


def test_a_command_to_load_it_counts_as_asking_though_it_is_there(start: Any) -> None:
    """A model that had come ahead left again, pinned or not, when its home was elsewhere."""
    local = start(12, A)
    settle(local)
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A, pinned=True))
    local.worker.on_homes(Homes(epoch=1, models=[]))
    settle(local)
    assert model(local, A).is_active and not make_report(local.worker, local.now).models[0].is_ahead


def test_what_was_sent_away_comes_back_when_it_is_asked_for(start: Any) -> None:
    local = start(12, A)
    settle(local)
    local.worker.on_command(Evict(epoch=1, command_id=1, model=A))
    settle(local)
    assert model(local, A).state is ModelState.COLD
    assert make_report(local.worker, local.now).models[0].is_sent_away
    local.submit("r", A, PROMPT, max_tokens=2)
    local.run()
    assert model(local, A).is_active and not make_report(local.worker, local.now).models[0].is_sent_away


def test_a_worker_that_has_just_begun_is_told_who_was_sent_away(start: Any) -> None:
    """What it loads by itself at its start is called off; the next request brings it in."""
    local = start(12, A)
    begin(local, A)
    local.worker.on_command(Evict(epoch=1, command_id=1, model=A))
    settle(local)
    assert model(local, A).state is ModelState.COLD and [done.error for done in local.outbox.done] == [None]
    local.submit("r", A, PROMPT, max_tokens=2)
    local.run()
    assert model(local, A).is_active


def test_what_was_moved_away_comes_when_it_lives_here_again(start: Any) -> None:
    """A move counted as an unloading, after which nothing came until somebody asked."""
    local = start(12, A)
    settle(local)
    local.worker.on_homes(Homes(epoch=1, models=[]))
    local.worker.on_command(Evict(epoch=1, command_id=1, model=A, returns=True, moved=True))
    settle(local)
    assert model(local, A).state is ModelState.COLD
    local.worker.on_homes(Homes(epoch=1, models=[A]))
    settle(local)
    assert model(local, A).is_active


def test_what_the_store_has_lost_meanwhile_is_not_waited_for(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = start(12, A)
    begin(local, A)
    load = model(local, A).load

    def lost(*_: Any) -> Any:
        raise NotHeld(A)

    monkeypatch.setattr(load, "_fetch", lost)
    settle(local)
    assert model(local, A).state is ModelState.COLD and not model(local, A).is_held
    local.submit("r", A, PROMPT, max_tokens=2)
    local.run()
    assert local.outbox.finished[("r", 0)] == "length"


@pytest.mark.parametrize("is_useful", [True, False])
def test_a_cache_gives_way_to_what_may_come_if_it_is_worth_less(
    start: Any, monkeypatch: pytest.MonkeyPatch, is_useful: bool
) -> None:
    """Caches of prompts that nobody repeats filled the device, and the next model's first request waited."""
    local = start(8, A)
    settle(local)
    monkeypatch.setattr(local.worker.host, "block_seconds", lambda name: 1.0 if is_useful else 1e-9)
    kv = model(local, A).kv
    assert kv is not None
    for i in range(100):
        local.submit(f"r{i}", A, [1 + i, *range(3, 300)], max_tokens=2)
        local.run()
        if kv.num_slabs == 6:
            break
    cached = kv.num_cached
    assert local.device.pool.num_free == 1 and cached > 5 * kv.layout.blocks_per_slab
    local.worker.on_homes(Homes(epoch=1, models=[A, B]))
    settle(local)
    assert model(local, B).is_active != is_useful and model(local, A).is_active
    lost = cached - kv.num_cached
    assert lost == 0 if is_useful else 0 < lost <= kv.layout.blocks_per_slab, "one slab was lacking"
    local.submit("again", A, PROMPT, max_tokens=2)
    local.submit("other", B, PROMPT, max_tokens=2)
    local.run()
    assert {("again", 0), ("other", 0)} <= local.outbox.finished.keys()


def test_what_nobody_looks_up_again_makes_a_cache_worth_less(start: Any) -> None:
    local = start(12, A)
    settle(local)
    holdings = local.worker.holdings
    chances = []
    for i in range(3):
        for j in range(16):
            local.submit(f"r{i}.{j}", A, [1 + i, 1 + j, *range(3, 290)], max_tokens=2)
            local.run()
        chances.append(holdings.reuse_chance(model(local, A), local.now))
        assert holdings.caches(local.now)[model(local, A).name].slabs > 0
    assert chances == sorted(chances, reverse=True) and chances[-1] < 0.5 * chances[0]
