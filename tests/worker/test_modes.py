"""The ways to share a device, as a worker carries them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.messages import Activate
from prism.modes import kv_shares, least_kv
from prism.types import MiB, ModelState
from prism.worker.views import estimate
from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.local_worker import LocalWorker

A, B, C = "llama", "qwen3", "mistral"
FAMILIES = (A, B, C)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name, seed=i), folder / name) for i, name in enumerate(FAMILIES)}


@pytest.fixture
def start(paths: dict[str, Path]) -> Iterator[Any]:
    workers: list[LocalWorker] = []

    def make(mode: str, num_slabs: int, *names: str, **scheduling: Any) -> LocalWorker:
        chosen = {name: paths[name] for name in names or FAMILIES}
        workers.append(LocalWorker(chosen, num_slabs, scheduling={"mode": mode} | scheduling))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def active(local: LocalWorker) -> set[str]:
    return {model.name for model in local.worker.models.values() if model.is_active}


def right(local: LocalWorker, request_id: str, name: str, prompt: list[int]) -> bool:
    expected = reference(make_model(name, seed=FAMILIES.index(name)), prompt, 16)
    return local.outbox.tokens.get((request_id, 0)) == expected


def test_the_least_kv_of_a_model_that_stays() -> None:
    """A worker took models in with one slab each, and could serve short requests only."""
    assert [least_kv(n, size * MiB) for n, size in ((2304, 32), (224, 2), (12, 2))] == [16, 3, 1]


def test_static_shares_are_fixed(start: Any) -> None:
    local = start("static", 12)
    for _ in range(20):
        local.pump()
    models = local.worker.models.values()
    assert active(local) == set(FAMILIES), "all are loaded although nobody has asked"
    assert {(m.kv_floor, m.kv_limit) for m in models} == {(3, 3)} and all(m.pinned for m in models)
    for i, prompt in enumerate(prompts(12, 400)):
        local.submit(str(i), FAMILIES[i % 3], prompt, max_tokens=16)
    local.run()
    assert all(m.kv is not None and m.kv.num_slabs <= 3 and not m.num_evictions for m in models)
    assert all(right(local, str(i), FAMILIES[i % 3], prompt) for i, prompt in enumerate(prompts(12, 400)))


def test_static_shares_go_by_expected_load_where_it_is_known(paths: dict[str, Path]) -> None:
    """As the simulator's do, by the same function; they were even in the server alone."""
    loads = dict(zip(FAMILIES, (0.75, 0.25, 0.0), strict=True))
    options = {name: {"expected_load": load} for name, load in loads.items()}
    local = LocalWorker(paths, 14, model_options=options, scheduling={"mode": "static"})
    shares = [model.kv_limit for model in local.worker.models.values()]
    local.close()
    assert shares == kv_shares(11, [1, 1, 1], list(loads.values())) == [7, 3, 1]


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_residents_have_their_lanes_from_the_start(start: Any, mode: str) -> None:
    """Lanes went by who was packed first: one server was not like another, and no prediction fitted both."""
    local = start(mode, 12)
    assert not active(local)
    assert all(model.lane is not None for model in local.worker.models.values())
    assert sum(lane.num_models for lane in local.worker.device.lanes) == len(FAMILIES)
    local.run()
    assert active(local) == set(FAMILIES)
    assert sum(lane.num_models for lane in local.worker.device.lanes) == len(FAMILIES)


def test_elastic_moves_kv_and_no_weights(start: Any) -> None:
    local = start("elastic", 7)
    for i, prompt in enumerate(prompts(30, 400)):
        local.submit(str(i), A if i < 25 else B, prompt, max_tokens=16)
    local.run()
    models = local.worker.models.values()
    assert active(local) == set(FAMILIES) and not any(m.num_evictions for m in models)
    assert all(m.kv_limit is None for m in models)


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_what_does_not_fit_beside_the_others_is_refused(start: Any, mode: str) -> None:
    local = start(mode, 5)
    local.submit("c", C, [1, 2], max_tokens=2)
    local.submit("a", A, [1, 2], max_tokens=2)
    local.run()
    error = local.outbox.rejected["c"].error
    assert error.status == 503 and "all models stay on the device" in error.message
    assert local.outbox.finished["a", 0] == "length"
    local.now += 100
    local.submit("later", C, [1, 2], max_tokens=2)
    local.run()
    assert local.outbox.rejected["later"].error.status == 503
    assert local.worker.models[C].state is ModelState.FAILED


@pytest.mark.parametrize("mode", ["static", "elastic"])
def test_a_command_cannot_load_what_does_not_fit(start: Any, mode: str) -> None:
    """The command was never answered, and the worker looked for the model's next try without a pause."""
    local = start(mode, 5)
    barred = local.worker.models[C]
    local.worker.on_command(Activate(command_id=1, epoch=1, model=C, pinned=None))
    assert "all models stay on the device" in (local.outbox.done[0].error or "")
    assert local.outbox.done[0].conflicts
    barred.pinned = barred.is_wanted = True  # as configured
    local.now += 100
    local.run()
    timer = local.worker.next_timer()
    assert timer is None or timer > local.now


def test_in_timeshare_a_command_loads_a_model_in_its_turn(start: Any) -> None:
    """The command was never answered: only models with requests had a turn."""
    local = start("timeshare", 12, A, B, quantum=0.05)
    local.submit("a", A, [1, 2], max_tokens=8)
    local.pump()
    local.worker.on_command(Activate(command_id=1, epoch=1, model=B, pinned=None))
    local.run(until=lambda: bool(local.outbox.done))
    assert local.outbox.done[0].error is None and active(local) == {B}
    local.worker.on_command(Activate(command_id=2, epoch=1, model=A, pinned=True))
    assert "pinned" in (local.outbox.done[1].error or "") and local.outbox.done[1].conflicts
    assert local.outbox.finished["a", 0] == "length"


def test_in_timeshare_one_model_is_there_at_a_time(start: Any) -> None:
    local = start("timeshare", 12, quantum=0.05)
    many = prompts(12, 100)
    for i, prompt in enumerate(many):
        local.submit(str(i), FAMILIES[i % 3], prompt, max_tokens=16)
    seen: list[str] = []

    def watch() -> bool:
        here = active(local)
        assert len(here) <= 1
        if here and (not seen or seen[-1] not in here):
            seen.extend(here)
        return False

    local.run(until=watch)
    assert set(seen) == set(FAMILIES)
    assert all(right(local, str(i), FAMILIES[i % 3], prompt) for i, prompt in enumerate(many))
    local.submit("again", seen[0], many[0], max_tokens=16)
    local.run(until=watch)
    assert right(local, "again", seen[0], many[0])


def test_in_timeshare_a_quantum_ends_what_would_go_on_for_ever(start: Any) -> None:
    local = start("timeshare", 12, A, B, quantum=0.05)
    local.submit("first", A, [1, 2, 3], max_tokens=30)
    local.submit("other", B, [1, 2, 3], max_tokens=2)
    count = 0
    for _ in range(400):
        if len(local.worker.requests.of_model(local.worker.models[A].name)) < 2:
            count += 1
            local.submit(f"more{count}", A, [4, 5, count], max_tokens=30)
        local.pump()
        if ("other", 0) in local.outbox.finished:
            break
    assert ("other", 0) in local.outbox.finished
    local.run()


def test_in_timeshare_a_request_is_told_when_its_models_turn_comes(start: Any) -> None:
    """It was told what lay before it as if all models ran, and nothing of the quantum."""
    local = start("timeshare", 12, A, B, quantum=1.0)
    for i in range(9):
        local.submit(f"a{i}", A, [1 + i] * 100, max_tokens=200)
    local.run(until=lambda: "a0" in local.outbox.started)
    local.worker.max_batch_size = 1
    for i in range(9):
        local.submit(f"later{i}", A, [10 + i] * 100, max_tokens=200)
    worker, other = local.worker, local.worker.models[B]
    estimates = []
    for seconds in (0.0, 2.0):
        local.now += seconds
        estimates.append(
            (estimate(worker, other, 1e9).seconds, estimate(worker, worker.models[A], 1e9).seconds)
        )
    (b_now, a_now), (b_later, a_later) = estimates
    assert b_now > a_now > 0, "all of A's go first"
    assert 0 < b_later < b_now, "A's quantum has passed: it ends what it runs"
    local.submit("b", B, [1, 2], max_tokens=2)
    assert estimate(worker, worker.models[A], 1e9).seconds > a_later, "B waits, so A's come after its turn"
    local.run()
    assert local.outbox.started["b"].estimated_seconds == pytest.approx(b_later, rel=0.5)


def test_a_request_that_waits_is_told_its_place(start: Any) -> None:
    local = start("prism", 12, A)
    local.submit("warm", A, [1], max_tokens=1)
    local.run()
    local.worker.max_batch_size = 1
    for i in range(4):
        local.submit(str(i), A, [1 + i] * 50, max_tokens=3)
    local.run()
    started = local.outbox.started
    assert [started[str(i)].queue_position for i in range(4)] == [1, 2, 3, 4]
    waits = [started[str(i)].estimated_seconds for i in range(4)]
    assert waits == sorted(waits) and waits[3] > 0
    assert started["warm"].estimated_seconds > 0, "its model had to come first"
