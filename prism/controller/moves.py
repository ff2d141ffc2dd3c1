"""All migrations under way: news become their events, their effects become routes and commands. Pure.

`migration.py` says what each next step is; here the steps are applied to the controller's state. Who has
commands sent is behind `Hands`: `mover.py` in the server, `prism/sim/controlling.py` in the simulator.
"""

from __future__ import annotations

from typing import Protocol, assert_never

from prism.controller import migration as steps
from prism.controller.migration import Migration, Phase
from prism.controller.state import ControllerState
from prism.types import ModelId, ModelState, WorkerId


class Hands(Protocol):
    """Does what migrations need, and hears how they fare.

    A command's outcome comes back as an event, with the migration's number.
    """

    def activate(self, model: ModelId, worker: WorkerId, number: int) -> None:
        """Have a model loaded."""
        ...

    def evict(self, model: ModelId, worker: WorkerId, returns: bool, number: int) -> None:
        """Have it evicted; with `returns` even if it has requests."""
        ...

    def switched(self, model: ModelId) -> None:
        """New requests go to the target."""
        ...

    def over(self, migration: Migration, failure: str | None) -> None:
        """It has ended; `failure` says why it has come to nothing."""
        ...

    def routes_changed(self) -> None:
        """Gateways must hear of it."""
        ...


class Moves:
    """Each model has one migration at most."""

    def __init__(
        self, state: ControllerState, hands: Hands, *, cooldown: float, drain_seconds: float
    ) -> None:
        self._state = state
        self._hands = hands
        self._cooldown = cooldown
        self._drain_seconds = drain_seconds
        self._numbers: dict[ModelId, int] = {}
        """How many migrations a model has begun: what is heard of an earlier one is void."""
        self._asked: dict[ModelId, float] = {}
        """What was asked of each model when its newest migration began, in devices."""

    def start(
        self,
        model: ModelId,
        source: WorkerId | None,
        target: WorkerId | None,
        now: float,
        compute: float = 0.0,
    ) -> None:
        """Begin a move, merge or replica (`compute` is asked of the model) of one that is not being moved."""
        assert model not in self._state.migrations
        self._numbers[model] = self._numbers.get(model, 0) + 1
        self._asked[model] = compute
        step = steps.begin(model, source, target, now)
        assert step.after is not None
        self._take(step.after, step, now)

    def on_report(self, worker: WorkerId, now: float) -> None:
        """A worker's news may be what a migration waits for."""
        for model, migration in tuple(self._state.migrations.items()):
            for event in self._heard(migration, worker):
                self.on_event(model, event, now)

    def _heard(self, migration: Migration, worker: WorkerId) -> list[steps.Event]:
        report = self._state.report_of(worker, migration.model)
        if report is None:
            return []
        if worker == migration.target:
            return [steps.TargetActive()] if report.state is ModelState.ACTIVE else []
        if worker == migration.source and report.state is ModelState.COLD:
            return [steps.SourceCold()]
        is_idle = worker == migration.source and report.num_running + report.num_waiting == 0
        return [steps.SourceIdle()] if is_idle else []

    def on_worker_ended(self, worker: WorkerId, now: float) -> None:
        """A worker has died, whatever its part."""
        for model in tuple(self._state.migrations):
            self.on_event(model, steps.WorkerEnded(worker), now)

    def tick(self, now: float) -> None:
        """Time has passed."""
        for model in tuple(self._state.migrations):
            self.on_event(model, steps.Tick(), now)

    def on_event(self, model: ModelId, event: steps.Event, now: float, number: int | None = None) -> None:
        """Something that concerns a model's migration; if `number` is given, that one alone."""
        migration = self._state.migrations.get(model)
        if migration is None or number not in (None, self._numbers[model]):
            return
        step = steps.advance(migration, event, now, self._drain_seconds)
        if step.after is not migration:
            self._take(migration, step, now)

    def _take(self, migration: Migration, step: steps.Step, now: float) -> None:
        model = migration.model
        if step.after is None:
            self._state.migrations.pop(model, None)
        else:
            self._state.migrations[model] = step.after
        for effect in step.effects:
            self._perform(migration, effect, now)
        if step.after is None or step.after.phase is not Phase.LOADING:
            self._hands.routes_changed()

    def _perform(self, migration: Migration, effect: steps.Effect, now: float) -> None:
        model = migration.model
        match effect:
            case steps.ActivateAt(worker):
                self._hands.activate(model, worker, self._numbers[model])
            case steps.EvictAt(worker, returns):
                self._hands.evict(model, worker, returns, self._numbers[model])
            case steps.Switch(old, new):
                self._state.switch(model, old, new, now, self._cooldown)
                if old is None:
                    self._state.replicated_at[model] = self._asked[model]
                self._hands.switched(model)
            case steps.Over(failure):
                if failure is not None:
                    self._state.stay(model, now, self._cooldown)
                self._hands.over(migration, failure)
            case _:
                assert_never(effect)
