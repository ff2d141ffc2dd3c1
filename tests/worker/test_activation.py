"""Loading and unloading as the loop sees them: slabs move at once, driver calls follow, loads stop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prism.config import Config
from prism.errors import DriverError
from prism.memory.failing import FailingDriver
from prism.memory.host import HostDriver
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.memory.tensors import tensor_at
from prism.messages import Activate, Evict
from prism.types import Address, Bytes, ModelId, ModelState
from prism.weights.client import PackedWeights, pack_here
from prism.weights.copiers import Piece
from prism.weights.protocol import WeightSource
from prism.weights.registrations import Registrations
from prism.weights.transfers import NEVER, Transfer
from prism.worker.loading import Load
from prism.worker.main import new_registrations
from prism.worker.models import Model, likely_order
from prism.worker.reports import make_report
from tests.support.checkpoints import make_model, reference, save
from tests.support.local_worker import SLAB, InlineLink, LocalWorker

PROMPT = [7, 8, 9]
A, B = "llama", "qwen3"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name, seed=i), folder / name) for i, name in enumerate((A, B))}


@pytest.fixture
def start(paths: dict[str, Path]) -> Iterator[Any]:
    workers: list[LocalWorker] = []

    def make(num_slabs: int = 2, **options: Any) -> LocalWorker:
        """Two models, by default on a device with room for one of them."""
        workers.append(LocalWorker(paths, num_slabs, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def model(local: LocalWorker, name: str) -> Model:
    return local.worker.models[name]


def warm(local: LocalWorker, name: str) -> None:
    local.submit(f"warm-{name}", name, PROMPT, max_tokens=1)
    local.run()


def advance(local: LocalWorker) -> None:
    """One round of the loop, without the jobs beside it."""
    for name in local.outbox.wanted:
        local.worker.on_packed(name)
    local.outbox.wanted.clear()
    local.worker.advance()
    local.check()


def begin_load(local: LocalWorker, name: str) -> Load:
    """Until the model's load has been started."""
    for _ in range(10):
        advance(local)
        if (load := model(local, name).load) is not None:
            return load
    raise AssertionError("the load does not begin")


def run_job(local: LocalWorker, index: int = 0) -> None:
    """Run one of the jobs that wait, and tell the loop of its end."""
    local.worker.on_job(local.jobs.queue.pop(index)())
    local.check()


def right(local: LocalWorker, request_id: str, name: str) -> bool:
    expected = reference(make_model(name, seed=(A, B).index(name)), PROMPT, 8)
    return local.outbox.tokens.get((request_id, 0)) == expected


# --- eviction does not delay -----------------------------------------------------------------------


def test_a_load_waits_for_no_unmapping(start: Any) -> None:
    """The victim's slabs go at once, and the newcomer is active before the victim's arena is unmapped."""
    local = start()
    warm(local, A)
    slabs = model(local, A).weight_slabs
    local.submit("r", B, PROMPT, max_tokens=8)
    begin_load(local, B)
    assert model(local, A).state is ModelState.EVICTING and not model(local, A).weight_slabs
    assert model(local, A).arena_slabs == slabs and not model(local, A).arena.is_empty  # type: ignore[union-attr]
    assert set(slabs) <= {*model(local, B).weight_slabs, *local.device.pool.owned(KvOwner(ModelId(B)))}
    assert len(local.jobs.queue) == 2  # the unmapping, then the load
    run_job(local, 1)
    assert model(local, B).is_active
    for _ in range(20):
        advance(local)
    assert right(local, "r", B)
    run_job(local)
    assert model(local, A).state is ModelState.COLD and not model(local, A).arena_slabs
    local.submit("again", A, PROMPT, max_tokens=8)
    local.run()
    assert right(local, "again", A)


def test_an_arena_is_empty_before_it_is_mapped_again(start: Any) -> None:
    """A model that is wanted again at once waits for its own unmapping, and for no longer."""
    local = start(num_slabs=4)
    warm(local, A)
    local.worker.on_command(Evict(epoch=1, command_id=1, model=A))
    local.submit("r", A, PROMPT, max_tokens=8)
    for _ in range(3):
        advance(local)
        assert model(local, A).load is None and len(local.jobs.queue) == 1
    run_job(local)
    begin_load(local, A)
    local.run()
    assert right(local, "r", A)


def test_an_unmapping_that_fails_delays_its_own_model_alone(start: Any) -> None:
    driver = FailingDriver(HostDriver(Bytes(2 * SLAB)))
    local = start(driver=driver)
    warm(local, A)
    local.submit("b", B, PROMPT, max_tokens=8)
    begin_load(local, B)
    driver.faults.fail_next(1)
    run_job(local)
    assert model(local, A).state is ModelState.EVICTING and model(local, A).num_unmap_failures == 1
    assert local.device.pool.shrink(2) == 0
    run_job(local)  # the load; behind it the next attempt
    for _ in range(20):
        advance(local)
    assert right(local, "b", B)
    run_job(local)
    assert model(local, A).state is ModelState.COLD


def test_an_arena_stays_while_queued_steps_may_read_it(start: Any) -> None:
    """The loop waits for a model's steps before it evicts it; the arena does not rely on that."""
    local = start()
    warm(local, A)
    pool, (lane,), victim = local.device.pool, local.device.lanes, model(local, A)
    free, num_weights = pool.num_free, len(victim.weight_slabs)
    for name in (A, B):  # another model's step is none of its readers
        lane.queue(ModelId(name), Queued())
    local.worker.residency.evict(victim, local.worker.reclaimer, local.worker)
    local.worker.residency.unmap_arenas()
    assert not local.jobs.queue and (pool.num_free, pool.num_retiring) == (free, num_weights)
    lane.num_completed = lane.flights.popleft().number
    pool.completed(lane.lane_id, lane.num_completed)
    local.worker.residency.unmap_arenas()
    assert len(local.jobs.queue) == 1 and pool.num_free == free + num_weights
    lane.num_completed = lane.flights.popleft().number
    run_job(local)
    assert victim.state is ModelState.COLD


class Queued:
    """A step that does not run."""

    def is_done(self) -> bool:
        return False


def test_a_load_that_has_failed_leaves_nothing_to_be_looked_for(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Busy workers look for no garbage."""
    transfers = list[weakref.ref[Transfer]]()

    def fail(transfer: Transfer, _checksums: Any) -> None:
        transfers.append(weakref.ref(transfer))
        raise DriverError("cuMemcpy", "injected")

    monkeypatch.setattr(Transfer, "verify", fail)
    gc.disable()
    try:
        local = start()
        local.submit("r", A, PROMPT)
        local.run()
        assert "injected" in local.outbox.rejected["r"].error.message
        assert transfers and all(transfer() is None for transfer in transfers)
    finally:
        gc.enable()


# --- what may be read ------------------------------------------------------------------------------


def step_link(local: LocalWorker) -> InlineLink:
    link = local.link
    assert isinstance(link, InlineLink)
    return link


def test_groups_arrive_in_order_and_can_be_read_in_the_arena(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = start(num_slabs=4)
    local.device.backend.copier.chunk_bytes = Bytes(1 << 16)
    local.submit("r", A, PROMPT, max_tokens=8)
    load = begin_load(local, A)
    profile, arena = model(local, A).profile, model(local, A).arena
    assert profile is not None and arena is not None
    ends, seen = profile.weights.group_ends, []
    link = step_link(local)

    with local.fetch(ModelId(A)) as packed:

        def watch(transfer: Any) -> None:
            while not transfer.has_ended.is_set():
                arrived = load.groups_arrived
                seen.append(arrived)
                if arrived:
                    size = ends[arrived - 1]
                    there = tensor_at(arena.base, (size,), torch.uint8)
                    assert (there.numpy() == packed.data[:size]).all()
                link.traffic.step()

        monkeypatch.setattr(link, "wait", watch)
        assert load.groups_arrived == 0 and load.progress == 0
        run_job(local)
    assert seen == sorted(seen) and len(set(seen)) > 2
    assert load.groups_arrived == len(ends) and load.progress == 1


def test_nothing_may_be_read_before_the_arena_is_mapped(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start(num_slabs=4)
    local.submit("r", A, PROMPT, max_tokens=1)
    load = begin_load(local, A)
    link, seen = step_link(local), []

    def copy_all(spec: object) -> None:
        while link.traffic.step():
            pass
        seen.append((load.progress, load.groups_arrived))

    monkeypatch.setattr(local.device.backend, "prepare", copy_all)
    run_job(local)
    assert seen == [(1.0, 0)] and load.groups_arrived > 0


def test_a_load_is_due_when_its_oldest_request_is(start: Any) -> None:
    local = start(num_slabs=4)
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    load = begin_load(local, A)
    assert load.deadline == NEVER
    local.submit("r", A, PROMPT, max_tokens=1)
    first = local.now
    local.submit("s", A, PROMPT, max_tokens=1)
    advance(local)
    assert load.deadline == first + 2.0
    local.cancel("r")
    advance(local)
    assert load.deadline > first + 2.0
    local.cancel("s")
    advance(local)
    assert load.deadline == NEVER
    local.run()


# --- loads that are called off ---------------------------------------------------------------------


def test_a_load_that_nobody_wants_gives_way_to_one_that_is_wanted(start: Any) -> None:
    local = start()
    local.submit("gone", A, PROMPT, max_tokens=8)
    load = begin_load(local, A)
    local.submit("r", B, PROMPT, max_tokens=8)
    advance(local)
    advance(local)
    assert not load.is_cancelled, "somebody still waits for it"
    local.cancel("gone")
    advance(local)
    assert load.is_cancelled
    run_job(local)
    assert model(local, A).state is ModelState.COLD and model(local, A).error is None
    begin_load(local, B)
    local.run()
    assert right(local, "r", B)
    assert model(local, A).num_activations == 0


def test_a_load_that_nobody_wants_is_finished_if_nobody_else_needs_the_memory(start: Any) -> None:
    local = start()
    local.submit("gone", A, PROMPT, max_tokens=8)
    load = begin_load(local, A)
    local.cancel("gone")
    advance(local)
    assert not load.is_cancelled
    run_job(local)
    assert model(local, A).is_active


def test_a_commanded_load_is_not_called_off_for_others(start: Any) -> None:
    local = start()
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    load = begin_load(local, A)
    local.submit("r", B, PROMPT, max_tokens=8)
    for _ in range(3):
        advance(local)
    assert not load.is_cancelled
    local.run()
    assert right(local, "r", B)


def test_a_called_off_load_that_is_wanted_again_starts_anew(start: Any) -> None:
    local = start()
    local.submit("gone", A, PROMPT, max_tokens=8)
    load = begin_load(local, A)
    local.submit("b", B, PROMPT, max_tokens=8)
    local.cancel("gone")
    advance(local)
    advance(local)
    assert load.is_cancelled
    local.submit("a", A, PROMPT, max_tokens=8)
    local.run()
    assert right(local, "a", A) and right(local, "b", B)
    assert not local.outbox.rejected


def test_unloading_a_loading_model_calls_its_load_off(start: Any) -> None:
    local = start(num_slabs=4)
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    load = begin_load(local, A)
    local.worker.on_command(Evict(epoch=1, command_id=2, model=A))
    assert load.is_cancelled
    run_job(local)
    assert model(local, A).state is ModelState.COLD
    assert local.device.pool.num_free == 4 and not local.device.pool.owned(WeightsOwner(ModelId(A)))
    (first, second) = local.outbox.done
    assert first.command_id == 1 and first.conflicts and "unloaded" in (first.error or "")
    assert second.command_id == 2 and second.error is None


def test_a_load_that_was_called_off_too_late_ends_all_the_same(start: Any) -> None:
    """Its last byte has arrived, and its event is on the way, when the command comes."""
    local = start(num_slabs=4)
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    begin_load(local, A)
    event = local.jobs.queue.pop()()
    local.worker.on_command(Evict(epoch=1, command_id=2, model=A))
    local.worker.on_job(event)
    assert model(local, A).state is ModelState.COLD and local.device.pool.num_free == 4
    assert [done.error is None for done in local.outbox.done] == [False, True]
    local.submit("r", A, PROMPT, max_tokens=8)
    for _ in range(3):  # it is wanted again, but its arena must be empty before it is mapped
        advance(local)
        assert not model(local, A).arena.is_empty  # type: ignore[union-attr]
        assert model(local, A).is_waiting_for_slabs and len(local.jobs.queue) == 1
    run_job(local)
    begin_load(local, A)
    local.run()
    assert right(local, "r", A)


def test_unloading_a_model_that_is_fetched_forgets_it(start: Any) -> None:
    local = start()
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    assert model(local, A).state is ModelState.FETCHING
    local.worker.on_command(Evict(epoch=1, command_id=2, model=A))
    assert model(local, A).state is ModelState.COLD
    assert [done.error is None for done in local.outbox.done] == [False, True]
    assert local.outbox.done[0].conflicts
    local.run()
    assert model(local, A).state is ModelState.COLD


def test_unloading_twice_is_done_when_the_arena_is_empty(start: Any) -> None:
    local = start()
    warm(local, A)
    for number in (1, 2):
        local.worker.on_command(Evict(epoch=1, command_id=number, model=A))
    assert not local.outbox.done
    run_job(local)
    assert [(done.command_id, done.error) for done in local.outbox.done] == [(1, None), (2, None)]


def test_a_failed_copy_gives_slabs_back_at_once(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start(num_slabs=4)
    local.submit("r", A, PROMPT, max_tokens=1)
    begin_load(local, A)

    def fail(*_: object) -> object:
        raise RuntimeError("no stream")

    monkeypatch.setattr(local.device.backend.copier, "begin", fail)
    run_job(local)
    assert model(local, A).state is ModelState.FAILED
    assert local.device.pool.num_free == 4
    assert model(local, A).arena_slabs  # still mapped, and unmapped in the background
    advance(local)
    assert "no stream" in local.outbox.rejected["r"].error.message
    run_job(local)
    assert not model(local, A).arena_slabs and model(local, A).state is ModelState.FAILED


# --- what is likely --------------------------------------------------------------------------------


def test_kept_models_are_likeliest_then_those_used_last(start: Any) -> None:
    local = start(num_slabs=8)
    assert likely_order(local.worker.models.values()) == [A, B]
    warm(local, B)
    assert likely_order(local.worker.models.values()) == [B, A]
    model(local, A).pinned = True
    assert likely_order(local.worker.models.values()) == [A, B]


# --- registered memory -----------------------------------------------------------------------------


class Pinner:
    """Registers everything, up to a limit."""

    def __init__(self) -> None:
        self.registered: dict[Address, Bytes] = {}
        self.limit = 1000

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        if len(self.registered) == self.limit:
            raise DriverError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        self.registered[address] = size

    def unregister_host(self, address: Address) -> None:
        del self.registered[address]


@pytest.fixture
def pinner() -> Pinner:
    return Pinner()


@pytest.fixture
def registrations(pinner: Pinner, paths: dict[str, Path]) -> Iterator[Registrations]:
    def borrow(model: ModelId, *, writable: bool) -> PackedWeights:
        return pack_here(WeightSource(model=model, path=str(paths[model])))

    registrations = Registrations(pinner, borrow, Bytes(1 << 30), [ModelId(A), ModelId(B)])
    yield registrations
    registrations.close()
    assert not pinner.registered


@pytest.fixture
def registered(start: Any, registrations: Registrations) -> LocalWorker:
    """All of the first model is registered."""
    local: LocalWorker = start(num_slabs=4, registrations=registrations)
    with local.fetch(ModelId(A)) as packed:
        local.worker.on_held(A, packed.total_bytes)
    while registrations.step():
        pass
    return local


def test_a_load_copies_from_what_is_registered(
    registered: LocalWorker, registrations: Registrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = registered
    seen, take = [], Transfer.take_piece

    def watch(transfer: Transfer, chunk_bytes: Bytes) -> Piece:
        piece = take(transfer, chunk_bytes)
        seen.append(piece.is_registered)
        registrations.prefer(())
        registrations.step()  # which must not take away what the load copies from
        return piece

    monkeypatch.setattr(Transfer, "take_piece", watch)
    for name in (A, B):
        local.submit(name, name, PROMPT, max_tokens=8)
        local.run()
        assert right(local, name, name)
    assert seen == [True, False]


def test_a_load_of_what_is_registered_asks_nobody(
    registered: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for the agent, and then for the store, for 5 to 14 ms."""
    local = registered
    monkeypatch.setattr(local, "fetch", lambda model: pytest.fail(f"{model} is asked for"))
    local.submit(A, A, PROMPT, max_tokens=8)
    local.worker.advance()
    assert model(local, A).state is ModelState.LOADING and local.outbox.wanted == [A]
    local.outbox.wanted.clear()  # the agent never answers
    local.run()
    assert right(local, A, A)


def test_what_was_packed_for_an_earlier_load_may_have_gone(start: Any) -> None:
    """The agent's answer may come when the model has been unloaded again."""
    local = start(num_slabs=4)
    local.worker.on_packed(A)
    local.submit(A, A, PROMPT, max_tokens=8)
    local.worker.advance()
    assert model(local, A).state is ModelState.FETCHING
    local.run()
    assert right(local, A, A)


def test_models_of_other_devices_are_not_registered(
    start: Any, registrations: Registrations, paths: dict[str, Path]
) -> None:
    local = start(num_slabs=4, registrations=registrations)
    config = model(local, A).config
    model(local, A).config = config.model_copy(update={"device": 1})
    model(local, B).config = config.model_copy(update={"device": 0, "name": B})
    for name in (A, B):
        local.worker.on_held(name, Bytes(1000))
    while registrations.step():
        pass
    assert registrations.registered_bytes(ModelId(A)) == 0
    assert registrations.registered_bytes(ModelId(B)) == 1000


def test_the_report_tells_what_is_registered_and_what_is_not(
    start: Any, pinner: Pinner, registrations: Registrations
) -> None:
    local = start(num_slabs=4, registrations=registrations)
    pinner.limit = 1
    for name in (A, B):
        local.worker.on_held(name, Bytes(1000))
    while registrations.step():
        pass
    report = make_report(local.worker, local.now)
    assert report.registered_bytes == 1000
    assert report.registration_error == "qwen3: cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY"
    assert [each.registered_bytes for each in report.models] == [1000, 0]


def test_without_a_device_that_gains_by_it_nothing_is_registered(start: Any) -> None:
    local = start(num_slabs=4)
    local.worker.on_held(A, Bytes(1000))
    report = make_report(local.worker, local.now)
    assert report.registered_bytes == 0 and report.registration_error is None
    assert new_registrations(Path("store.sock"), local.device, local.config) is None


def test_what_may_be_registered_is_configured(start: Any, pinner: Pinner) -> None:
    local = start(num_slabs=4)
    local.device.backend.pinner = pinner
    for registered, expected in (("0", None), (None, 16 << 30), ("3GiB", 3 << 30)):
        config = Config.model_validate(
            {"models": [{"name": A, "path": "."}], "host_memory": {"registered": registered}}
        )
        made = new_registrations(Path("store.sock"), local.device, config)
        assert (None if made is None else made._budget) == expected
