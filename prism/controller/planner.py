"""Has placement decide, at intervals and at demand, and sees to it that it happens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from prism.config import SchedulingConfig
from prism.controller.decisions import Decision, Merge, Move, Plan, Rehome, Replicate
from prism.controller.demand import DemandWindow
from prism.controller.links import WorkerLinks
from prism.controller.mover import Mover
from prism.controller.placement import decide
from prism.controller.pressure import Fleet, entry_of
from prism.controller.snapshot import Home, PlacementSnapshot, Policy
from prism.controller.state import ControllerState
from prism.controller.views import Catalog, snapshot
from prism.errors import Conflict, InvalidRequest
from prism.messages import Report
from prism.metrics import Metrics
from prism.types import ModelId, WorkerId

log = logging.getLogger(__name__)


class Planner:
    """Who lives where; the only one that changes homes."""

    def __init__(
        self,
        config: SchedulingConfig,
        catalog: Catalog,
        state: ControllerState,
        links: WorkerLinks,
        routes_changed: Callable[[], None],
        now: Callable[[], float],
        metrics: Metrics,
    ) -> None:
        self.mover = Mover(
            state,
            links,
            routes_changed,
            now,
            metrics,
            cooldown=config.migration_cooldown,
            drain_seconds=config.drain_timeout,
        )
        self.workers = frozenset(device.worker for device in catalog.devices)
        self.plan: Plan | None = None
        """How the last look found everything."""
        self._catalog = catalog
        self._state = state
        self._links = links
        self._routes_changed = routes_changed
        self._now = now
        self._demand = DemandWindow(config.demand_window, dict(state.speeds))
        self._interval = config.placement_interval
        self._due = now() + config.placement_interval
        self._policy = Policy(
            gain=config.migration_gain,
            cooldown=config.migration_cooldown,
            horizon=config.demand_window,
            max_moves=config.max_migrations,
        )

    # --- events ---------------------------------------------------------------------------------------

    def on_report(self, report: Report) -> None:
        """A worker's counters and states."""
        worker, now = WorkerId(report.worker), self._now()
        self._demand.on_report(report, now)
        self.mover.on_report(worker)
        if self._state.adopt(worker, now):
            self._routes_changed()

    def on_worker_ended(self, worker: WorkerId) -> None:
        """What was on its way from or to there is decided anew. Homes stay: it will be started again."""
        self.mover.on_worker_ended(worker)

    def tick(self) -> None:
        """Called about every second."""
        self.mover.tick()
        if self._interval and self._now() >= self._due:
            self._due = self._now() + self._interval
            self.place()

    def to_preload(self, worker: WorkerId) -> list[ModelId]:
        """What a worker that has come up is to load at once, unless the configuration told itself."""
        if len(self.workers) == 1:
            return []
        models = (m for m in self._catalog.models if m.model in self._catalog.preloaded and m.device is None)
        homes = self._state
        return [
            m.model for m in models if homes.workers(m.model)[0] == worker and not homes.resident(m.model)
        ]

    # --- looking at everything ------------------------------------------------------------------------

    def place(self) -> None:
        """One round."""
        before, self.plan = self.plan, decide(self._snapshot(), self._now())
        plan = self.plan
        for model in sorted(plan.infeasible - (before.infeasible if before else frozenset())):
            log.error("model %s fits no device", model)
        is_changed = False
        for decision in plan.decisions:
            is_changed = self._carry_out(decision, plan) or is_changed
        if is_changed:
            self._routes_changed()

    def _carry_out(self, decision: Decision, plan: Plan) -> bool:
        """Whether homes are others at once."""
        model = decision.model
        if model in self._state.migrations:
            return False  # a second decision on it in one round: the next round comes
        log.info("placement: %s", decision)
        match decision:
            case Rehome():
                return self._state.set_homes(model, plan.homes[model])
            case Move(source=source, target=target):
                self.mover.start(model, source, target)
            case Replicate(target=target):
                self.mover.start(model, None, target)
            case Merge(source=source):
                self.mover.start(model, source, None)
            case _:
                assert_never(decision)
        return False

    def _snapshot(self) -> PlacementSnapshot:
        return snapshot(self._catalog, self._state, self._demand, self._links.up, self._policy, self._now())

    # --- one model ------------------------------------------------------------------------------------

    def on_demand(self, model: ModelId) -> None:
        """Somebody waits for a model: if none of its homes is up, it gets the best device that is, now."""
        state, up = self._state, self._links.up
        if model not in state.homes or model in state.migrations or not up or up & {*state.workers(model)}:
            return
        now = self._now()
        seen = self._snapshot()
        models = tuple(replace(m, is_wanted=True) if m.model == model else m for m in seen.models)
        others = frozenset(state.homes) - {model}
        homes = seen.homes | {model: ()}
        policy = replace(self._policy, max_moves=0)
        plan = decide(replace(seen, models=models, homes=homes, busy=others, policy=policy), now)
        if state.set_homes(model, plan.homes[model]):
            log.info("model %s lives on %s, since its home is away", model, state.workers(model)[0])
            self._routes_changed()

    def check_move(self, model: ModelId, target: WorkerId) -> None:
        """Raise what speaks against a move by hand: `InvalidRequest` or `Conflict`."""
        seen = self._snapshot()
        device = next((device for device in seen.devices if device.worker == target), None)
        if device is None:
            raise InvalidRequest(f"there are {len(seen.devices)} devices", param="device")
        need = next(each for each in seen.models if each.model == model)
        if need.device not in (None, target):
            raise Conflict(f"the configuration binds model {model} to {need.device}", param="device")
        if model in self._state.migrations:
            raise Conflict(f"model {model} is being moved", param="model")
        if not Fleet([device]).holds(entry_of(need, 1), 0):
            raise InvalidRequest(f"{target} has too little memory for model {model}", param="device")

    async def move(self, model: ModelId, target: WorkerId) -> str | None:
        """Returns when new requests go to the target; the text says why they never will."""
        state = self._state
        source = state.workers(model)[0]
        if target in state.workers(model):
            return None
        if source in state.resident(model):
            self.mover.start(model, source, target)
            return await self.mover.switched(model)
        rest = tuple(home for home in state.homes[model] if home.worker != source)
        state.set_homes(model, (Home(target, self._now()), *rest))
        self._routes_changed()
        return None
