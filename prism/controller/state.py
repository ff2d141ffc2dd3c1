"""What the controller knows: the last reports, where each model lives, and what is being moved. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from prism.controller.migration import Migration, Phase
from prism.controller.snapshot import Home
from prism.messages import ModelReport, Report, Route
from prism.types import ModelId, ModelState, WorkerId

FRESH_SECONDS = 30.0
"""A home that was just decided on may have nothing in memory yet."""
RESIDENT = (ModelState.FETCHING, ModelState.LOADING, ModelState.ACTIVE)


@dataclass(slots=True)
class ControllerState:
    """Rebuilt from the workers' reports by every new controller."""

    epoch: int
    homes: dict[ModelId, tuple[Home, ...]]
    speeds: dict[WorkerId, float] = field(default_factory=dict)
    reports: dict[WorkerId, Report] = field(default_factory=dict)
    migrations: dict[ModelId, Migration] = field(default_factory=dict)
    replicated_at: dict[ModelId, float] = field(default_factory=dict)
    """What was asked of a model when it last got one more home, in devices."""
    version: int = 0
    _models: dict[WorkerId, dict[ModelId, ModelReport]] = field(default_factory=dict)
    _sent_away: dict[WorkerId, frozenset[ModelId]] = field(default_factory=dict)
    """What was unloaded there; outlives the worker, whose next incarnation knows nothing of it."""

    # --- routes ---------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """The whole routing table."""
        return [self._route(model) for model in self.homes]

    def _route(self, model: ModelId) -> Route:
        workers = self.workers(model)
        weights = [self.speeds.get(worker, 1.0) for worker in workers]
        migration = self.migrations.get(model)
        is_draining = migration is not None and migration.phase is not Phase.LOADING
        draining = [migration.source] if is_draining and migration and migration.source else []
        return Route(
            model=model,
            workers=list(workers),
            weights=weights if len(set(weights)) > 1 else [],
            draining=list(draining),
        )

    def workers(self, model: ModelId) -> tuple[WorkerId, ...]:
        """Where it lives; the first is the one that tells its state."""
        return tuple(home.worker for home in self.homes[model])

    def set_homes(self, model: ModelId, homes: tuple[Home, ...]) -> bool:
        """Whether routes are others by it."""
        before = self.workers(model)
        self.homes[model] = homes
        return self.workers(model) != before

    # --- reports --------------------------------------------------------------------------------------

    def on_report(self, report: Report) -> bool:
        """A worker's state; an earlier incarnation's is void, and of no effect."""
        worker = WorkerId(report.worker)
        known = self.reports.get(worker)
        if known is not None and report.incarnation < known.incarnation:
            return False
        self.reports[worker] = report
        self._models[worker] = {ModelId(model.model): model for model in report.models}
        sent_away = frozenset(ModelId(model.model) for model in report.models if model.is_sent_away)
        self._sent_away[worker] = sent_away if known else sent_away | self.sent_away(worker)
        return True

    def on_worker_ended(self, worker: WorkerId) -> None:
        """Nothing is known of it until its next incarnation reports."""
        self.reports.pop(worker, None)
        self._models.pop(worker, None)

    def sent_away(self, worker: WorkerId) -> frozenset[ModelId]:
        """The models that an administrator has unloaded there, and nobody has asked for since."""
        return self._sent_away.get(worker, frozenset())

    def report_of(self, worker: WorkerId, model: ModelId) -> ModelReport | None:
        """What a worker says of a model."""
        return self._models.get(worker, {}).get(model)

    def reports_of(self, model: ModelId) -> list[ModelReport]:
        """What all workers say of a model that know of it."""
        return [models[model] for models in self._models.values() if model in models]

    def model_report(self, model: ModelId) -> ModelReport | None:
        """What the model's first home says of it."""
        return self.report_of(self.workers(model)[0], model)

    def living_at(self, worker: WorkerId) -> list[ModelId]:
        """The models that have a home there."""
        return sorted(model for model in self.homes if worker in self.workers(model))

    def places(self, model: ModelId) -> tuple[WorkerId, ...]:
        """Its homes, and beside them where it comes from, goes to, or is."""
        migration = self.migrations.get(model)
        ends = () if migration is None else (migration.source, migration.target)
        others = [worker for worker in ends if worker is not None]
        others += sorted(worker for worker in self._models if self._state(worker, model) in RESIDENT)
        return tuple(dict.fromkeys((*self.workers(model), *others)))

    def resident(self, model: ModelId) -> frozenset[WorkerId]:
        """Where it is in memory, or on its way there."""
        found = [(worker, models[model]) for worker, models in self._models.items() if model in models]
        return frozenset([w for w, report in found if not report.is_ahead and report.state in RESIDENT])

    def _state(self, worker: WorkerId, model: ModelId) -> ModelState | None:
        report = self.report_of(worker, model)
        return None if report is None or report.is_ahead else report.state

    # --- what is so, whoever decided it ---------------------------------------------------------------

    def adopt(self, worker: WorkerId, now: float) -> bool:
        """Make homes agree with what a worker reports; whether routes are others by it.

        1. A model that is active there, and in memory at none of its homes, lives there.
        2. One that is in memory at a home as well lives on both: placement merges what is too much.
        3. Of several homes one that has evicted it is none any more.
        """
        is_changed = False
        for model, report in self._models.get(worker, {}).items():
            homes = self.homes.get(model)
            if homes is None or report.is_ahead or model in self.migrations:
                continue
            state = report.state
            if state is ModelState.ACTIVE or (state is ModelState.COLD and len(homes) > 1):
                is_changed = self._adopt(model, homes, worker, state, now) or is_changed
        return is_changed

    def _adopt(
        self, model: ModelId, homes: tuple[Home, ...], worker: WorkerId, state: ModelState, now: float
    ) -> bool:
        home = next((home for home in homes if home.worker == worker), None)
        if home is None:
            if state is not ModelState.ACTIVE:
                return False
            kept = tuple(home for home in homes if self._state(home.worker, model) in RESIDENT)
            return self.set_homes(model, (*kept, Home(worker)))  # 1, 2
        if len(homes) > 1 and state is ModelState.COLD and now - home.since >= FRESH_SECONDS:
            return self.set_homes(model, tuple(each for each in homes if each is not home))  # 3
        return False

    def switch(
        self, model: ModelId, old: WorkerId | None, new: WorkerId | None, now: float, cooldown: float
    ) -> None:
        """One home instead of another, or more, or less; the others count as new, too."""
        homes = self.homes[model]
        moved = [home for home in homes if home.worker == old]
        rest = [replace(home, since=now, has_failed=False) for home in homes if home.worker not in (old, new)]
        if new is not None:
            rest.append(moved[0].moved(new, now, cooldown) if moved else Home(new, now))
        self.homes[model] = tuple(rest) or homes

    def stay(self, model: ModelId, now: float, cooldown: float) -> None:
        """A migration has failed: as long as after one that has not, it is not tried again."""
        stayed = (home.moved(home.worker, now, cooldown) for home in self.homes[model])
        self.homes[model] = tuple(replace(home, has_failed=True) for home in stayed)
