"""First steps of models that are still on their way in: launched behind the copy, layer by layer.

    begin -> launch what has arrived -> queued on the lane -> has run -> committed, when the load ended well
      └──────────────┴─────────────────────┴──────────────┴───────> dropped, if the load ends otherwise

A load takes hundreds of milliseconds, so the lane goes on with other models' steps meanwhile: such a step
has buffers of its own (`Runner.run`, `is_apart`), and counts as the lane's work when all of it is launched.
What is dropped has never been: its requests wait again with the tokens that they had, and what it has
launched already is marked on the lane, so that its memory changes owner behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from prism.engine.step import Step
from prism.messages import ResumedChoice
from prism.types import RequestId
from prism.worker import turns
from prism.worker.device import Device
from prism.worker.host_kv import HostKv
from prism.worker.lanes import Flight
from prism.worker.models import Model
from prism.worker.reclaimer import Reclaimer
from prism.worker.views import arrival_of

SLICE_SECONDS = 0.0005
"""Of launches while other lanes have work; they pass it by half a layer at most."""


class Listener(Protocol):
    """What others do about these steps."""

    def announce(self, model: Model, step: Step) -> None:
        """Tell gateways what starts."""
        ...

    def commit(self, flight: Flight) -> float:
        """Account for a step that has run."""
        ...


class EarlySteps:
    """Those of one device: one at most for each load, and for each lane."""

    def __init__(
        self,
        device: Device,
        models: Mapping[str, Model],
        reclaimer: Reclaimer,
        host: HostKv,
        listener: Listener,
        suspended: Callable[[dict[RequestId, list[ResumedChoice]]], None],
        *,
        max_batch_tokens: int,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._models = models
        self._reclaimer = reclaimer
        self._host = host
        self._listener = listener
        self._suspended = suspended
        self._max_batch_tokens = max_batch_tokens
        self._patience = patience
        self._clock = clock

    def step(self, now: float) -> bool:
        """Go on with all of them; whether anything came of it."""
        moving = [
            m for m in self._models.values() if m.early is not None or (m.load is not None and m.is_arriving)
        ]
        progress = [self._begin(m, now) if m.early is None else self.go_on(m, m.early) for m in moving]
        return any(progress)

    def go_on(self, model: Model, flight: Flight) -> bool:
        """Launch what has arrived; commit what has run when the model is active."""
        if not flight.is_launched:
            return self._launch(model, flight)
        if not model.is_active:
            return False
        model.early = None  # if it has not run yet, it is a step like any other now
        if flight.has_run:
            self._listener.commit(flight)
        return True

    def _begin(self, model: Model, now: float) -> bool:
        engine, lane = model.engine, model.lane
        assert engine is not None and lane is not None
        budget = turns.decide_early(arrival_of(model, self._models, self._max_batch_tokens))
        if budget is None or now < model.stalled_until:
            return False
        self._reclaimer.ensure_kv(model, engine.scheduler.wants(budget), now)
        step = engine.schedule(budget)
        if step is None:
            model.stalled_until = now + self._patience
            return True
        model.has_stepped_early = True
        self._listener.announce(model, step)
        self._host.fetch(model, step.fetches)
        flight = engine.run(step, is_apart=True)
        model.early = Flight(model.name, flight, flight, is_apart=True)
        self._launch(model, model.early)
        return True

    def _launch(self, model: Model, flight: Flight) -> bool:
        assert flight.step is not None and model.lane is not None
        num_groups = None if model.load is None else model.load.groups_arrived
        has_advanced = flight.step.launch(num_groups, SLICE_SECONDS)
        if has_advanced:
            model.lane.launched_apart(self._device.lanes)
        if flight.is_launched:
            flight.begin = self._clock()
            model.lane.append_apart(flight)
        return has_advanced

    def drop(self, model: Model) -> None:
        """The load ends badly, or somebody leaves whose step is half launched: all of it has never been."""
        engine, lane, flight = model.engine, model.lane, model.early
        if engine is None or lane is None:
            return
        model.early = None
        if flight is not None and flight.step is not None:
            engine.drop(flight.step)
            if not flight.number and flight.step.is_begun:
                lane.append_apart(Flight(model.name, self._device.backend.mark(lane.lane_id), None))
            flight.step = None
        self._suspended(engine.suspend())
