"""A migration's steps, and that whatever happens a model has a home, and one only in the end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from prism.controller import migration as m
from prism.controller.migration import Migration, Phase, Step, advance, begin
from prism.controller.moves import Moves
from prism.controller.snapshot import Home
from prism.controller.state import ControllerState
from prism.types import ModelId, WorkerId

A = ModelId("a")
W0, W1 = WorkerId("worker-0"), WorkerId("worker-1")
DRAIN = 60.0


def at(phase: Phase, source: WorkerId | None = W0, target: WorkerId | None = W1) -> Migration:
    return Migration(A, source, target, phase, since=100.0)


def after(migration: Migration, event: m.Event, seconds: float = 5.0) -> Step:
    return advance(migration, event, 100.0 + seconds, DRAIN)


def test_the_way_of_a_move() -> None:
    step = begin(A, W0, W1, 100.0)
    assert step == Step(at(Phase.LOADING), (m.ActivateAt(W1),))
    assert step.after is not None
    step = after(step.after, m.TargetActive(), 0.0)
    assert step == Step(at(Phase.DRAINING), (m.Switch(W0, W1),))
    assert step.after is not None
    step = after(step.after, m.SourceIdle())
    assert step.effects == (m.EvictAt(W0, returns=False),) and step.after is not None
    assert after(step.after, m.SourceCold()) == Step(None, (m.Over(),))


def test_replicas_need_no_draining_and_merges_no_loading() -> None:
    assert after(at(Phase.LOADING, None), m.TargetActive()) == Step(None, (m.Switch(None, W1), m.Over()))
    assert begin(A, W0, None, 100.0) == Step(at(Phase.DRAINING, target=None), (m.Switch(W0, None),))


@pytest.mark.parametrize(
    ("event", "seconds", "effects"),
    [
        (m.TargetFailed("no"), 5, (m.Over("no"),)),
        (m.WorkerEnded(W1), 5, (m.Over("worker-1 ended while it loaded the model"),)),
        (m.WorkerEnded(W0), 5, (m.Switch(W0, W1), m.Over())),
        (m.CalledOff(), 5, (m.EvictAt(W1, returns=True), m.Over("called off"))),
        (m.Tick(), 121, (m.EvictAt(W1, returns=True), m.Over("worker-1 has not loaded it within 120 s"))),
    ],
)
def test_what_ends_a_load(event: m.Event, seconds: float, effects: tuple[m.Effect, ...]) -> None:
    assert after(at(Phase.LOADING), event, seconds) == Step(None, effects)


@pytest.mark.parametrize("event", [m.Tick(), m.SourceIdle(), m.SourceCold(), m.WorkerEnded(WorkerId("x"))])
def test_what_does_not_concern_a_load(event: m.Event) -> None:
    assert after(at(Phase.LOADING), event) == Step(at(Phase.LOADING))


def test_a_source_is_not_evicted_while_gateways_may_still_send_there() -> None:
    for event in (m.SourceIdle(), m.SourceCold()):
        assert after(at(Phase.DRAINING), event, 0.5) == Step(at(Phase.DRAINING))


def test_a_source_that_is_late_returns_what_it_has() -> None:
    assert after(at(Phase.DRAINING), m.Tick(), 59) == Step(at(Phase.DRAINING))
    assert after(at(Phase.DRAINING), m.Tick(), 60).effects == (m.EvictAt(W0, returns=True),)


def test_an_eviction_that_is_refused_is_tried_again() -> None:
    step = after(at(Phase.EVICTING), m.EvictRefused())
    assert step.after is not None and step.after.phase is Phase.DRAINING and not step.effects


@pytest.mark.parametrize("phase", [Phase.DRAINING, Phase.EVICTING])
def test_deaths_after_the_switch(phase: Phase) -> None:
    assert after(at(phase), m.WorkerEnded(W0)) == Step(None, (m.Over(),))
    failure = m.Over("worker-1 ended before the source was evicted")
    assert after(at(phase), m.WorkerEnded(W1)) == Step(None, (m.Switch(W1, W0), failure))


class NoHands:
    """Nothing comes of what is asked for by itself."""

    def activate(self, model: ModelId, worker: WorkerId, number: int) -> None: ...

    def evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None: ...

    def switched(self, model: ModelId) -> None: ...

    def over(self, migration: Migration, failure: str | None) -> None: ...

    def routes_changed(self) -> None: ...


def test_a_home_that_did_not_come_is_none_that_was_got() -> None:
    """What was asked for at the failed attempt decided when a home went that had come for less."""
    state = ControllerState(1, {A: (Home(W0),)})
    moves = Moves(state, NoHands(), cooldown=60.0, drain_seconds=DRAIN)
    moves.start(A, None, W1, 0.0, 0.4)
    moves.on_event(A, m.TargetActive(), 1.0)
    moves.start(A, None, WorkerId("worker-2"), 20.0, 1.2)
    moves.on_event(A, m.TargetFailed("full"), 21.0)
    assert state.workers(A) == (W0, W1) and state.replicated_at == {A: 0.4}


@dataclass
class World:
    """Two workers as far as a migration sees them, and where requests are."""

    rng: random.Random
    now: float = 0.0
    homes: list[WorkerId] = field(default_factory=lambda: [W0])
    active: set[WorkerId] = field(default_factory=lambda: {W0})
    requests: dict[WorkerId, int] = field(default_factory=lambda: {W0: 3, W1: 0})
    loading: bool = False
    evicting: WorkerId | None = None

    def perform(self, effects: tuple[m.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case m.ActivateAt():
                    self.loading = True
                case m.EvictAt(worker, returns):
                    self.loading = False if worker == W1 else self.loading
                    if returns:
                        self.give_back(worker)
                    self.evicting = worker
                case m.Switch(old, new):
                    self.homes = [home for home in self.homes if home != old]
                    self.homes += [] if new is None else [new]
                case m.Over():
                    pass

    def give_back(self, worker: WorkerId) -> None:
        """The gateways send them to a home; a cold one loads the model."""
        count, self.requests[worker] = self.requests[worker], 0
        for _ in range(count):
            home = self.rng.choice(self.homes)
            self.requests[home] += 1
            self.active.add(home)

    def event(self) -> m.Event:
        """Something that can happen now."""
        self.now += self.rng.choice([0.2, 1.0, 5.0, 40.0])
        roll = self.rng.random()
        if roll < 0.06:
            return self.die(self.rng.choice([W0, W1]))
        if roll < 0.3:  # a request comes, maybe to where the model is leaving
            worker = self.rng.choice([*self.homes, *self.active])
            self.requests[worker] += 1
            self.active.add(worker)
        for worker in (W0, W1):
            self.requests[worker] = max(0, self.requests[worker] - self.rng.randint(0, 2))
        return self.news()

    def news(self) -> m.Event:
        if self.loading and self.rng.random() < 0.3:
            self.loading = False
            if self.rng.random() < 0.2:
                return m.TargetFailed("full")
            self.active.add(W1)
            return m.TargetActive()
        if self.evicting is not None and self.rng.random() < 0.5:
            worker, self.evicting = self.evicting, None
            if self.requests[worker]:
                return m.EvictRefused()
            self.active.discard(worker)
            return m.SourceCold() if worker == W0 else m.Tick()
        return m.SourceIdle() if self.requests[W0] == 0 else m.Tick()

    def die(self, worker: WorkerId) -> m.Event:
        self.active.discard(worker)
        self.loading = self.loading and worker != W1
        self.evicting = None if self.evicting == worker else self.evicting
        return m.WorkerEnded(worker)


@pytest.mark.parametrize("seed", range(300))
def test_whatever_happens_there_is_one_home_and_it_ends(seed: int) -> None:
    world = World(random.Random(seed))
    step = begin(A, W0, W1, world.now)
    world.perform(step.effects)
    overs = 0
    for _ in range(400):
        if step.after is None:
            break
        event = world.event()
        step = advance(step.after, event, world.now, DRAIN)
        world.perform(step.effects)
        overs += sum(isinstance(effect, m.Over) for effect in step.effects)
        if isinstance(event, m.WorkerEnded):
            world.give_back(event.worker)  # the gateways hear of it, and hold or send what was there
        assert len(world.homes) == 1
        assert step.after is None or step.after.phase is not Phase.LOADING or world.homes == [W0]
        assert step.after is None or step.after.phase is Phase.LOADING or world.homes == [W1]
    assert step.after is None and overs == 1, "it ends, once"
    if world.evicting in world.homes:  # the target died meanwhile: a cold home loads it for the next request
        assert world.homes == [W0]
