"""Looks at everything from time to time, and has homes changed and models moved. Pure.

What is decided is in `placement.py`; `planner.py` runs this in the server, `prism/sim/controlling.py` in the
simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, assert_never

from prism.config import SchedulingConfig
from prism.controller.decisions import Decision, Merge, Move, Plan, Rehome, Replicate
from prism.controller.demand import DemandWindow
from prism.controller.moves import Moves
from prism.controller.placement import decide
from prism.controller.snapshot import PlacementSnapshot, Policy
from prism.controller.state import ControllerState
from prism.controller.views import Catalog, snapshot
from prism.messages import Report
from prism.types import ModelId, WorkerId

SOON = 1.0
"""Seconds in which each worker reports."""


class Round(NamedTuple):
    """What a look has begun."""

    decisions: tuple[Decision, ...] = ()
    are_routes_changed: bool = False


class Placer:
    """The only one that changes homes."""

    def __init__(
        self,
        config: SchedulingConfig,
        catalog: Catalog,
        state: ControllerState,
        moves: Moves,
        up: Callable[[], frozenset[WorkerId]],
        now: float,
    ) -> None:
        """`up` are the workers that can be commanded."""
        self.plan: Plan | None = None
        """How the last look found everything."""
        self._catalog = catalog
        self._state = state
        self._moves = moves
        self._up = up
        self._demand = DemandWindow(config.demand_window, dict(state.speeds))
        self._interval = config.placement_interval
        self.due = now + self._interval if self._interval else float("inf")
        """When it looks next."""
        self._policy = Policy(
            gain=config.migration_gain,
            cooldown=config.migration_cooldown,
            horizon=config.demand_window,
            max_moves=config.max_migrations,
        )

    def on_report(self, report: Report, now: float) -> bool:
        """A worker's counters and states, once the state has them; whether routes are others by it."""
        worker = WorkerId(report.worker)
        self._demand.on_report(report, now)
        self._moves.on_report(worker, now)
        return self._state.adopt(worker, now)

    def tick(self, now: float) -> Round:
        """Time has passed: it may be time to look."""
        self._moves.tick(now)
        if now < self.due:
            return Round()
        self.due = now + self._interval
        return self.place(now)

    def place(self, now: float) -> Round:
        """Look at everything."""
        self.plan = plan = decide(self.snapshot(now), now)
        carried_out = []
        are_changed = False
        for decision in plan.decisions:
            if decision.model in self._state.migrations:
                continue  # a second decision on it in one round: the next round comes
            carried_out.append(decision)
            are_changed = self._carry_out(decision, plan, now) or are_changed
        return Round(tuple(carried_out), are_changed)

    def _carry_out(self, decision: Decision, plan: Plan, now: float) -> bool:
        """Whether homes are others at once."""
        match decision:
            case Rehome(model=model):
                return self._state.set_homes(model, plan.homes[model])
            case Move(model=model, source=source, target=target):
                self._moves.start(model, source, target, now)
            case Replicate(model=model, target=target, compute=compute):
                self._moves.start(model, None, target, now, compute)
            case Merge(model=model, source=source):
                self._moves.start(model, source, None, now)
            case _:
                assert_never(decision)
        return False

    def snapshot(self, now: float) -> PlacementSnapshot:
        """What placement sees."""
        return snapshot(self._catalog, self._state, self._demand, self._up(), self._policy, now)

    def on_demand(self, model: ModelId, now: float) -> bool:
        """Somebody waits for a model: if none of its homes is up, it gets the best device that is, now.

        Returns whether it did.
        """
        state, up = self._state, self._up()
        if model not in state.homes or model in state.migrations or not up or up & {*state.workers(model)}:
            return False
        seen = self.snapshot(now)
        models = tuple(replace(m, is_wanted=True) if m.model == model else m for m in seen.models)
        others = frozenset(state.homes) - {model}
        homes = seen.homes | {model: ()}
        policy = replace(self._policy, max_moves=0)
        plan = decide(replace(seen, models=models, homes=homes, busy=others, policy=policy), now)
        return state.set_homes(model, plan.homes[model])

    def look_soon(self, now: float) -> None:
        """Something has changed of which workers are about to report; without effect if nothing moves."""
        if self._interval:
            self.due = min(self.due, now + SOON)
