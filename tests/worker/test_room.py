"""What pinned models leave to others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.errors import WireError
from prism.messages import Abandon, Activate, Evict, Homes, SetLimits
from prism.types import ModelState
from prism.worker.reclaimer import slabs_to_activate
from tests.support.checkpoints import make_model, save
from tests.support.local_worker import SLAB, LocalWorker

NUM_SLABS = 3
"""Each of the models takes two of them, weights and KV."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model("llama", seed=i), folder / name) for i, name in enumerate("ab")}


@pytest.fixture
def start(paths: dict[str, Path]) -> Iterator[Any]:
    workers: list[LocalWorker] = []

    def make(num_slabs: int = NUM_SLABS, **options: Any) -> LocalWorker:
        workers.append(LocalWorker(paths, num_slabs, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def load(local: LocalWorker, number: int, model: str, pinned: bool | None = None) -> None:
    local.worker.on_command(Activate(epoch=1, command_id=number, model=model, pinned=pinned))


def set_floor(local: LocalWorker, number: int, model: str, slabs: int) -> None:
    local.worker.on_command(
        SetLimits(epoch=1, command_id=number, model=model, kv_floor_bytes=slabs * SLAB, kv_limit_bytes=None)
    )


def refused(local: LocalWorker, request_id: str) -> WireError:
    return local.outbox.rejected[request_id].error


def crowd_out(local: LocalWorker) -> None:
    """`a` is pinned and keeps all that `b` would need."""
    local.submit("learnt", "b", [1], max_tokens=1)
    local.run()
    set_floor(local, 1, "a", NUM_SLABS - 1)
    load(local, 2, "a", pinned=True)
    local.run()


def test_the_models_are_as_the_tests_assume(start: Any) -> None:
    local = start()
    local.submit("r", "a", [1], max_tokens=1)
    local.run()
    assert slabs_to_activate(local.worker.models["a"]) == 2


def test_who_has_no_room_is_told_by_the_pin_and_its_clients_are_not_blamed(start: Any) -> None:
    """They were told that their prompt was too long for a context of 0 tokens."""
    local = start()
    crowd_out(local)
    assert local.outbox.done[-1].error is None
    assert local.outbox.done[-1].without_room == ["b"]
    local.submit("r", "b", [1])
    error = refused(local, "r")
    assert (error.status, error.code) == (503, "unavailable")
    assert "take 2 slabs, and pinned models (a) leave 0 of 3" in error.message
    assert error.retry_after is not None
    load(local, 3, "a", pinned=False)
    assert local.outbox.done[-1].without_room == []
    local.submit("at-once", "b", [1], max_tokens=2)
    local.run()
    assert local.outbox.finished["at-once", 0] == "length"


def test_a_floor_that_is_raised_beside_a_pinned_model(start: Any) -> None:
    """Its own, or the other's: both leave it no room."""
    local = start(num_slabs=4)
    load(local, 1, "a", pinned=True)
    local.submit("warm", "b", [1], max_tokens=1)
    local.run()
    local.worker.on_command(Evict(epoch=1, command_id=2, model="b"))
    local.run()
    set_floor(local, 3, "b", 3)
    local.submit("own", "b", [1])
    assert refused(local, "own").status == 503
    set_floor(local, 4, "b", 0)
    local.submit("fits", "b", [1], max_tokens=1)
    local.run()
    assert ("fits", 0) in local.outbox.finished
    set_floor(local, 5, "a", 3)
    assert local.outbox.done[-1].without_room == ["b"]
    local.submit("another's", "b", [1])
    assert refused(local, "another's").status == 503


def test_what_waits_when_its_room_goes_is_refused(start: Any) -> None:
    """A request and a command that were under way waited for what could not come."""
    local = start()
    load(local, 1, "b")
    local.submit("r", "b", [1])
    local.outbox.wanted.clear()  # it is being packed
    set_floor(local, 2, "a", NUM_SLABS - 1)
    load(local, 3, "a", pinned=True)
    local.run()
    assert "pinned models (a) leave 0" in refused(local, "r").message
    (done,) = [done for done in local.outbox.done if done.command_id == 1]
    assert done.conflicts and "pinned models (a)" in (done.error or "")
    assert local.worker.models["a"].is_active and not local.worker.models["b"].is_wanted


def test_a_load_without_room_is_refused_at_once_and_leaves_nothing(start: Any) -> None:
    """It waited for two minutes, stayed in force, and took the requests of the model that was there."""
    local = start()
    crowd_out(local)
    for number, pinned in ((3, None), (4, True)):
        load(local, number, "b", pinned)
        done = local.outbox.done[-1]
        assert done.command_id == number and done.conflicts
        assert "pinned models (a) leave 0" in (done.error or "")
    assert not local.worker.models["b"].pinned
    local.submit("r", "a", [1], max_tokens=2)
    local.run()
    assert local.outbox.finished["r", 0] == "length"
    load(local, 5, "a", pinned=False)
    local.run()
    assert local.worker.models["b"].state is ModelState.COLD


@pytest.mark.parametrize("pinned", [None, True])
def test_a_load_that_nobody_waits_for_any_more_is_over(start: Any, pinned: bool | None) -> None:
    local = start()
    load(local, 1, "b", pinned)
    load(local, 2, "b")
    local.outbox.wanted.clear()  # it is being packed
    local.worker.on_abandon(Abandon(epoch=1, command_id=1))
    model = local.worker.models["b"]
    assert model.is_wanted, "somebody else waits"
    local.worker.on_abandon(Abandon(epoch=1, command_id=2))
    local.worker.on_packed("b")
    local.run()
    assert (model.state, model.pinned, model.is_wanted) == (ModelState.COLD, False, False)
    assert not local.outbox.done


def test_a_pin_that_comes_to_nothing_keeps_no_room(start: Any) -> None:
    """Its model could not be packed, and the memory was kept for it."""
    local = start()
    set_floor(local, 1, "a", NUM_SLABS - 1)
    load(local, 2, "a", pinned=True)
    local.outbox.wanted.clear()
    local.worker.on_packing_failed("a", "truncated")
    assert not local.worker.models["a"].pinned and local.outbox.done[-1].error == "truncated"
    local.submit("r", "b", [1], max_tokens=1)
    local.run()
    assert ("r", 0) in local.outbox.finished


def test_a_pinned_model_that_cannot_come_keeps_no_room(start: Any) -> None:
    options = {"a": {"pinned": True, "memory": {"floor": 2 * SLAB}}}
    local = start(model_options=options)
    local.pump()
    local.outbox.wanted.clear()
    local.worker.on_packing_failed("a", "truncated")
    local.submit("r", "b", [1], max_tokens=1)
    local.run(until=lambda: ("r", 0) in local.outbox.finished)
    assert "r" not in local.outbox.rejected
    local.now = local.worker.models["a"].retry_at
    local.run()
    assert local.worker.models["a"].is_active


def test_what_was_sent_away_keeps_no_room_until_it_is_asked_for(start: Any) -> None:
    local = start()
    crowd_out(local)
    local.worker.on_command(Evict(epoch=1, command_id=3, model="a"))
    local.submit("r", "b", [1], max_tokens=1)
    local.run()
    assert ("r", 0) in local.outbox.finished
    local.submit("back", "a", [1], max_tokens=1)
    local.run()
    assert ("back", 0) in local.outbox.finished
    local.submit("late", "b", [1])
    assert refused(local, "late").status == 503


def test_of_two_pinned_models_that_do_not_fit_the_first_stays_and_is_served(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kept its memory from the other: the one that was there had its requests refused."""
    local = start(model_options={name: {"pinned": True, "memory": {"floor": 2 * SLAB}} for name in "ab"})
    local.run(until=lambda: any(model.is_active for model in local.worker.models.values()))
    first, other = sorted("ab", key=lambda name: not local.worker.models[name].is_active)
    local.pump()
    assert local.worker.models[other].state is ModelState.FAILED
    assert f"model {first} cannot" not in caplog.text
    local.submit("r", first, [1], max_tokens=1)
    local.run(until=lambda: ("r", 0) in local.outbox.finished)
    assert "r" not in local.outbox.rejected
    local.submit("other", other, [1])
    assert f"pinned models ({first}) leave 0" in refused(local, "other").message


def test_the_log_says_at_the_start_who_has_no_room(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    local = start(model_options={"a": {"pinned": True, "memory": {"floor": 2 * SLAB}}})
    local.run()
    local.worker.on_homes(Homes(epoch=1, models=["a", "b"]))
    assert "model b cannot be loaded" in caplog.text and "pinned models (a) leave 0" in caplog.text
    local.worker.on_homes(Homes(epoch=1, models=["a", "b"]))
    assert caplog.text.count("model b cannot be loaded") == 1
