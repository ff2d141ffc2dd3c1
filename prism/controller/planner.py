"""Where models live, in the server: has `placer.py` look now and then and at demand, and logs what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prism.config import SchedulingConfig
from prism.controller.decisions import Plan
from prism.controller.links import WorkerLinks
from prism.controller.migration import CalledOff
from prism.controller.mover import Mover
from prism.controller.placer import Placer, Round
from prism.controller.pressure import Fleet, entry_of
from prism.controller.snapshot import Home
from prism.controller.state import ControllerState
from prism.controller.views import Catalog
from prism.errors import Conflict, InvalidRequest
from prism.messages import Report
from prism.metrics import Metrics
from prism.types import ModelId, WorkerId

log = logging.getLogger(__name__)


class Planner:
    """Gives `Placer` clock and connections, and takes an administrator's moves."""

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
        self.workers = frozenset(device.worker for device in catalog.devices)
        self._catalog = catalog
        self._state = state
        self._routes_changed = routes_changed
        self._now = now
        self._mover = Mover(
            state,
            links,
            routes_changed,
            now,
            metrics,
            cooldown=config.migration_cooldown,
            drain_seconds=config.drain_timeout,
        )
        self._moves = self._mover.moves
        self._placer = Placer(config, catalog, state, self._moves, lambda: links.up, now())
        self._infeasible: frozenset[ModelId] = frozenset()

    @property
    def plan(self) -> Plan | None:
        """How the last look found everything."""
        return self._placer.plan

    # --- events ---------------------------------------------------------------------------------------

    def on_report(self, report: Report) -> None:
        """A worker's counters and states."""
        if self._placer.on_report(report, self._now()):
            self._routes_changed()

    def on_worker_ended(self, worker: WorkerId) -> None:
        """What was on its way from or to there is decided anew. Homes stay: it will be started again."""
        self._moves.on_worker_ended(worker, self._now())

    def tick(self) -> None:
        """Called about every second."""
        self._tell(self._placer.tick(self._now()))

    def place(self) -> None:
        """Look at everything now."""
        self._tell(self._placer.place(self._now()))

    def look_soon(self) -> None:
        """A command has changed who has room."""
        self._placer.look_soon(self._now())

    def _tell(self, done: Round) -> None:
        infeasible = frozenset() if self.plan is None else self.plan.infeasible
        for model in sorted(infeasible - self._infeasible):
            log.error("model %s fits no device", model)
        self._infeasible = infeasible
        for decision in done.decisions:
            log.info("placement: %s", decision)
        if done.are_routes_changed:
            self._routes_changed()

    def to_preload(self, worker: WorkerId) -> list[ModelId]:
        """What a worker that has come up is to load at once, unless the configuration told itself."""
        if len(self.workers) == 1:
            return []
        models = (m for m in self._catalog.models if m.is_wanted and m.device is None)
        state, sent_away = self._state, self._state.sent_away(worker)
        here = [m.model for m in models if state.workers(m.model)[0] == worker]
        return [model for model in here if model not in sent_away and not state.resident(model)]

    # --- one model ------------------------------------------------------------------------------------

    def on_demand(self, model: ModelId) -> None:
        """Somebody waits for a model."""
        if self._placer.on_demand(model, self._now()):
            log.info("model %s lives on %s, since its home is away", model, self._state.workers(model)[0])
            self._routes_changed()

    def call_off(self, model: ModelId) -> None:
        """An administrator wants something else than its migration."""
        self._moves.on_event(model, CalledOff(), self._now())

    def check_move(self, model: ModelId, target: WorkerId) -> None:
        """Raise what speaks against a move by hand: `InvalidRequest` or `Conflict`."""
        seen = self._placer.snapshot(self._now())
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
            log.info("model %s moves from %s to %s by hand", model, source, target)
            self._moves.start(model, source, target, self._now())
            return await self._mover.until_switched(model)
        rest = tuple(home for home in state.homes[model] if home.worker != source)
        state.set_homes(model, (Home(target, self._now()), *rest))
        self._routes_changed()
        return None
