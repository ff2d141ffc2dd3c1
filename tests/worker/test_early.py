"""A model's first step runs behind the copy of its weights, and has never been if the load ends badly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prism.errors import CheckpointError, NotHeld
from prism.memory.slabs import KvOwner
from prism.messages import Activate, CancelChoice, Evict
from prism.types import Bytes, ModelId, ModelState
from prism.worker import reclaim
from prism.worker.loading import Load
from prism.worker.models import Model
from prism.worker.snapshot import Need
from tests.support import late
from tests.support.checkpoints import make_model, prompts, reference, save
from tests.support.late import LateBackend
from tests.support.local_worker import GATEWAY, InlineLink, LocalWorker

A, B, C = "llama", "qwen3", "qwen2"
FAMILIES = (A, B, C)
PROMPT = (prompts(1, 90)[0] * 90)[:90]
NUM_TOKENS = 24
GROUPS = 5
"""Embedding, three layers, head."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save(make_model(name, seed=i), folder / name) for i, name in enumerate(FAMILIES)}


@pytest.fixture(params=["at once", "late"])
def start(paths: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Callable[..., LocalWorker]]:
    workers: list[LocalWorker] = []

    def make(num_slabs: int = 16, **options: Any) -> LocalWorker:
        backend = LateBackend() if request.param == "late" else None
        workers.append(LocalWorker(paths, num_slabs, backend=backend, **options))
        workers[-1].device.backend.copier.chunk_bytes = Bytes(1 << 14)
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def model(local: LocalWorker, name: str) -> Model:
    return local.worker.models[name]


def right(local: LocalWorker, request_id: str, name: str, prompt: list[int] = PROMPT) -> bool:
    expected = reference(make_model(name, seed=FAMILIES.index(name)), prompt, NUM_TOKENS)
    return local.outbox.tokens.get((request_id, 0)) == expected


def advance(local: LocalWorker, rounds: int = 1) -> None:
    """Rounds of the loop, without the jobs beside it."""
    for _ in range(rounds):
        for name in local.outbox.wanted:
            local.worker.on_packed(name)
        local.outbox.wanted.clear()
        local.worker.advance()
        local.check()
        local.now += 0.001


def begin_load(local: LocalWorker, name: str) -> Load:
    for _ in range(10):
        advance(local)
        if (load := model(local, name).load) is not None:
            return load
    raise AssertionError("the load does not begin")


def load_slowly(
    local: LocalWorker, monkeypatch: pytest.MonkeyPatch, between: Callable[[], None], rounds: int = 3
) -> None:
    """Run the load that waits; after each piece that arrives the loop makes some rounds."""
    link = local.link
    assert isinstance(link, InlineLink)

    def wait(transfer: Any) -> None:
        while not transfer.has_ended.is_set():
            link.traffic.step()
            advance(local, rounds)
            between()

    with monkeypatch.context() as patch:
        patch.setattr(link, "wait", wait)
        event = local.jobs.queue.pop()()
    advance(local, rounds)  # its event is still on the way
    local.worker.on_job(event)
    local.check()


def num_sampled(local: LocalWorker, name: str) -> int | None:
    """Tokens that the model's first step draws. A number: pytest would print views of the window."""
    early = model(local, name).early
    return None if early is None or early.step is None else len(early.step.sampled)


def damage(local: LocalWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes arrive, but their checksums do not match."""

    def verify(transfer: object, arrived: object) -> None:
        raise CheckpointError("arrived damaged", file="packed")

    monkeypatch.setattr("prism.weights.transfers.Transfer.verify", verify)


def test_the_first_step_follows_the_copy(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it has run before the load has ended, in pieces; no token leaves before."""
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)
    seen: list[tuple[int, bool]] = []

    def watch() -> None:
        early = model(local, A).early
        if early is not None and early.step is not None:
            seen.append((load.groups_arrived, early.is_launched))
            assert early.is_launched <= (load.groups_arrived == GROUPS)
        assert not local.outbox.tokens and model(local, A).state is ModelState.LOADING

    load_slowly(local, monkeypatch, watch)
    assert {groups for groups, _ in seen} >= {1, 2, 3} and seen[-1] == (GROUPS, True)
    assert num_sampled(local, A) == 1 and "r" in local.outbox.started
    assert not local.outbox.tokens and model(local, A).is_active
    advance(local)
    assert len(local.outbox.tokens["r", 0]) == 1
    local.run()
    assert right(local, "r", A)


def test_several_requests_share_the_first_step(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start()
    many = prompts(6, 60, seed=3)
    for i, prompt in enumerate(many):
        local.submit(str(i), A, prompt, max_tokens=NUM_TOKENS, n=1 + i % 2)
    begin_load(local, A)
    load_slowly(local, monkeypatch, lambda: None)
    assert (num_sampled(local, A) or 0) >= 6
    local.run()
    assert all(right(local, str(i), A, prompt) for i, prompt in enumerate(many))


def test_a_prompt_that_does_not_fit_one_step_goes_on_when_loaded(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = start(max_batch_tokens=40)
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    begin_load(local, A)
    load_slowly(local, monkeypatch, lambda: None)
    assert num_sampled(local, A) == 0
    local.run()
    assert right(local, "r", A)


def test_neighbours_go_on_between_the_pieces(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models decode, one of them on the same lane, while a third one's first step is launched."""
    local = start()
    for name in (A, C):
        local.submit(f"warm-{name}", name, PROMPT[:5], max_tokens=1)
        local.run()
    for name in (A, C):
        local.submit(f"neighbour-{name}", name, PROMPT, max_tokens=400)
    streams = [(f"neighbour-{name}", 0) for name in (A, C)]
    local.run(until=lambda: all(len(local.outbox.tokens.get(stream, [])) > 20 for stream in streams))
    local.submit("r", B, PROMPT, max_tokens=NUM_TOKENS)
    begin_load(local, B)
    counts: list[tuple[int, int]] = []

    def watch() -> None:
        early = model(local, B).early
        if early is not None and not early.is_launched:
            counts.append(tuple(len(local.outbox.tokens[f"neighbour-{n}", 0]) for n in (A, C)))  # type: ignore

    load_slowly(local, monkeypatch, watch, rounds=2)
    assert len(counts) > 3 and counts[0][0] < counts[-1][0] and counts[0][1] < counts[-1][1]
    assert model(local, B).lane in (model(local, A).lane, model(local, C).lane)
    local.run(until=lambda: ("r", 0) in local.outbox.finished)
    assert right(local, "r", B)
    for name in (A, C):
        text = local.outbox.tokens[f"neighbour-{name}", 0]
        expected = reference(make_model(name, seed=FAMILIES.index(name)), PROMPT, NUM_TOKENS)
        assert text[:NUM_TOKENS] == expected
        local.cancel(f"neighbour-{name}")
    local.run()


@pytest.mark.parametrize("when", range(1, GROUPS + 1))
def test_a_load_that_fails_takes_the_first_step_back(
    start: Any, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """However far it had come: no token was sent, the request is answered once, and memory is whole."""
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)
    transfer: Any = None

    def fail() -> None:
        nonlocal transfer
        transfer = load._transfer
        if load.groups_arrived >= when and transfer.error is None:
            transfer.error = RuntimeError("the link broke")

    load_slowly(local, monkeypatch, fail)
    assert model(local, A).state is ModelState.FAILED and model(local, A).early is None
    assert model(local, A).engine.is_idle and not model(local, A).engine.num_queued  # type: ignore[union-attr]
    assert not local.outbox.tokens and "the link broke" in local.outbox.rejected["r"].error.message
    local.run()
    local.now += 10
    local.submit("again", A, PROMPT, max_tokens=NUM_TOKENS)
    local.run()
    assert right(local, "again", A)


def test_a_damaged_copy_is_no_answer(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    begin_load(local, A)
    with monkeypatch.context() as patch:
        damage(local, patch)
        load_slowly(local, monkeypatch, lambda: None)
    assert not local.outbox.tokens and "damaged" in local.outbox.rejected["r"].error.message
    local.run()
    local.now += 10
    local.submit("again", A, PROMPT, max_tokens=NUM_TOKENS)
    local.run()
    assert right(local, "again", A)


def test_a_load_that_must_be_repeated_loses_no_request(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights had left the store: it is fetched again, and its requests wait as if they had not run."""
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    local.submit("two", A, PROMPT, max_tokens=NUM_TOKENS, n=2)
    load = begin_load(local, A)

    def fail() -> None:
        if load.groups_arrived >= 3 and load._transfer is not None:
            load._transfer.error = NotHeld("gone")

    load_slowly(local, monkeypatch, fail)
    assert model(local, A).state is ModelState.FETCHING and not local.outbox.rejected
    assert not any(ticket.is_running for ticket in local.worker.requests)
    local.run()
    assert right(local, "r", A) and right(local, "two", A)
    assert local.outbox.tokens["two", 0] == local.outbox.tokens["two", 1]


@pytest.mark.parametrize("groups", [2, GROUPS])
def test_whoever_leaves_takes_only_its_own(start: Any, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """A client goes while its prompt is half launched, or launched; another's request is answered."""
    local = start()
    local.submit("gone", A, PROMPT, max_tokens=NUM_TOKENS)
    local.submit("stays", A, PROMPT[:50], max_tokens=NUM_TOKENS)
    local.submit("half", A, PROMPT[:30], max_tokens=NUM_TOKENS, n=2)
    load = begin_load(local, A)
    done: list[bool] = []

    def leave() -> None:
        if load.groups_arrived >= groups and not done:
            early = model(local, A).early
            assert early is not None and early.is_launched is (groups == GROUPS)
            local.cancel("gone")
            local.worker.on_cancel(GATEWAY, CancelChoice(request_id="half", attempt=0, choice=0))
            local.check()
            done.append(True)

    load_slowly(local, monkeypatch, leave)
    local.run()
    assert done and ("gone", 0) not in local.outbox.tokens and ("half", 0) not in local.outbox.tokens
    assert right(local, "stays", A, PROMPT[:50])
    expected = reference(make_model(A, seed=0), PROMPT[:30], NUM_TOKENS)
    assert local.outbox.tokens["half", 1] == expected


def test_a_load_that_is_called_off_leaves_nothing_behind(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start()
    local.submit("gone", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)
    commands: list[bool] = []

    def leave() -> None:
        if load.groups_arrived >= 2 and not commands:
            local.cancel("gone")
            local.worker.on_command(Evict(epoch=1, command_id=1, model=A))
            commands.append(True)

    load_slowly(local, monkeypatch, leave)
    assert model(local, A).state is ModelState.COLD and not local.outbox.tokens
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    local.run()
    assert right(local, "r", A)


def test_nobody_takes_memory_that_a_dropped_step_may_still_write(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched before the load failed is marked on the lane, and memory is free behind the mark."""
    local = start()
    backend, marks = local.device.backend, []

    class Mark:
        def __init__(self) -> None:
            self.done = False
            marks.append(self)

        def is_done(self) -> bool:
            return self.done

    monkeypatch.setattr(backend, "mark", lambda lane: Mark())
    free = local.device.pool.num_free
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)

    def fail() -> None:
        if load.groups_arrived >= 2 and load._transfer is not None:
            load._transfer.error = RuntimeError("the link broke")

    load_slowly(local, monkeypatch, fail)
    pool = local.device.pool
    assert len(marks) == 1 and pool.num_retiring and pool.num_free + pool.num_retiring == free
    advance(local, 5)
    assert pool.num_retiring and not local.jobs.queue, "the arena is mapped while the step may read it"
    marks[0].done = True
    advance(local)
    assert not pool.num_retiring and local.jobs.queue
    local.run()


def test_memory_taken_behind_others_goes_back_behind_them(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loading model may take slabs in which its lane still works: a load that fails at once frees none."""

    class Working:
        done = False

        def is_done(self) -> bool:
            return self.done

    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)
    lane, work = model(local, A).lane, Working()
    assert lane is not None
    lane.queue(model(local, B).name, work)

    def fail() -> None:
        if load._transfer is not None:
            load._transfer.error = RuntimeError("the link broke")

    monkeypatch.setattr(type(load), "groups_arrived", 0)
    load_slowly(local, monkeypatch, fail)
    assert model(local, A).state is ModelState.FAILED and local.device.pool.num_retiring == 1
    work.done = True
    local.run()
    advance(local)
    assert not local.device.pool.num_retiring


def test_nobody_takes_memory_from_a_step_whose_rest_is_launched_when_the_load_has_ended(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older request took slabs between the load's end and the step's: blocks were moved or became others'
    with the KV of some layers still to be written to their old places, and answers were wrong."""
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    load = begin_load(local, A)
    arrived = type(load).groups_arrived.fget
    monkeypatch.setattr(type(load), "groups_arrived", property(lambda load: min(2, arrived(load))))
    load_slowly(local, monkeypatch, lambda: None)
    half = model(local, A)
    kv, early = half.kv, half.early
    assert half.is_active and early is not None and not early.is_launched and kv is not None
    kv.add_slab(local.device.pool.take(KvOwner(half.name), 1)[0])
    kv.add_slab(local.device.pool.take(KvOwner(half.name), 1)[0])
    (holding,) = local.worker.holdings.snapshot(0.0, local.now).holdings
    need = Need(ModelId(B), 1, (0.0, "older", 0), for_weights=False, blocks=1)
    snapshot = local.worker.holdings.snapshot(0.0, local.now)
    assert not holding.is_active and not reclaim.decide(snapshot, need, local.now)
    local.worker.reclaimer.trim(half)
    assert kv.num_slabs == 3
    local.run()
    assert right(local, "r", A)


def test_models_on_their_way_at_the_same_time(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three loads share the link; each model's text is right, whatever became of its first step."""
    local = start()
    for name in FAMILIES:
        local.submit(name, name, PROMPT, max_tokens=NUM_TOKENS)
    for name in FAMILIES:
        begin_load(local, name)
    link = local.link
    assert isinstance(link, InlineLink)
    early: set[str] = set()

    def wait(transfer: Any) -> None:
        while not transfer.has_ended.is_set():
            link.traffic.step()
            advance(local, 3)
            early.update(m.name for m in local.worker.models.values() if m.early is not None)

    monkeypatch.setattr(link, "wait", wait)
    local.run()
    assert early and all(right(local, name, name) for name in FAMILIES)


def test_a_load_by_command_has_no_first_step(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    local = start()
    local.worker.on_command(Activate(epoch=1, command_id=1, model=A))
    begin_load(local, A)
    load_slowly(local, monkeypatch, lambda: None)
    assert model(local, A).is_active and not model(local, A).has_stepped_early
    assert [done.error for done in local.outbox.done] == [None]


def test_who_waits_for_a_load_has_the_loop_look_at_it(start: Any) -> None:
    local = start()
    local.submit("r", A, PROMPT, max_tokens=NUM_TOKENS)
    begin_load(local, A)
    timer = local.worker.next_timer()
    assert timer is not None and timer - local.now <= 0.002
    local.run()


def test_who_runs_beside_its_pieces_has_not_the_device_alone(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What such steps take is compared with a profile, which was measured without neighbours."""
    local = LocalWorker(paths, 24, backend=LateBackend())
    local.device.backend.copier.chunk_bytes = Bytes(1 << 14)
    local.submit("a", A, PROMPT, max_tokens=200)
    local.run(until=lambda: len(local.outbox.tokens.get(("a", 0), [])) > 3)
    local.submit("b", B, PROMPT, max_tokens=NUM_TOKENS)
    begin_load(local, B)
    seen = set[bool]()

    def look() -> None:
        lane = model(local, A).lane
        assert lane is not None
        seen.update(flight.is_beside for flight in lane.flights)

    look()
    assert seen == {False}
    load_slowly(local, monkeypatch, look)
    assert True in seen
    local.run()
    assert right(local, "b", B)
    local.close()


def test_what_a_first_step_took_is_no_measurement(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for weights, and the lane had nothing to do before: that was called its time, too."""
    monkeypatch.setattr(late, "LOOKS", 30)  # its end is seen when the model is active
    local = LocalWorker(paths, 24, backend=LateBackend())
    local.device.backend.copier.chunk_bytes = Bytes(1 << 14)
    local.submit("warm", A, PROMPT, max_tokens=3)
    local.run()
    local.worker.evict(model(local, A))
    local.run()
    prompts, usage = local.worker.costs.steps(ModelId(A))["prompt"], model(local, A).usage
    before, busy = prompts.num_steps, usage.device_seconds
    local.now += 600.0
    local.submit("a", A, PROMPT, max_tokens=1)
    begin_load(local, A)
    load_slowly(local, monkeypatch, lambda: None, rounds=1)
    early = model(local, A).early
    assert model(local, A).is_active and (early is None or not early.has_run)
    local.run()
    assert ("a", 0) in local.outbox.finished and prompts.num_steps == before
    assert 0 < usage.device_seconds - busy < 1
    local.close()
