"""Which models are on a simulated device; mirrors `worker/residency.py`.

Packed weights of all models are taken to be in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from prism.modes import Rules
from prism.sim.jobs import Job
from prism.sim.link import Link
from prism.sim.memory import Memory, rank_of, slabs_to_activate
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.ticks import NEVER, first_after, to_seconds
from prism.types import ModelId, ModelState
from prism.worker import ahead, timeshare


class Device(Protocol):
    """Where models are bound, and taken off."""

    def evict(self, model: SimModel) -> None:
        """Give up an active model's memory; what it was running waits again."""
        ...

    def bind(self, model: SimModel) -> None:
        """It gets a lane, unless it has one."""
        ...

    def stop_growing(self, model: SimModel | None = None) -> None:
        """See `memory.Owner`."""
        ...


class Loader:
    """Brings models in, and in `timeshare` chooses which."""

    def __init__(
        self,
        models: Mapping[ModelId, SimModel],
        memory: Memory,
        rules: Rules,
        limits: Limits,
        device: Device,
    ) -> None:
        self._models = models
        self._memory = memory
        self._rules = rules
        self._limits = limits
        self._device = device
        self.link = Link()
        self._current: SimModel | None = None
        """In `timeshare`, who has the device, or is on its way to it."""
        self._since = 0
        self.wake_at = NEVER
        """When time alone may change a decision."""
        if rules.is_resident:
            for model in models.values():
                model.is_pinned = True
                memory.activate(model)
                device.bind(model)
                model.state = ModelState.ACTIVE

    def move(self, now: int) -> None:
        """Bring in what is wanted and fits."""
        self.wake_at = NEVER
        if self._rules.is_exclusive:
            self._take_turns(now)
        elif not self._rules.is_resident:
            self._bring_wanted(now)

    def arrived(self, now: int) -> list[SimModel]:
        """Models that can run steps from now on."""
        models = self.link.arrived(now)
        for model in models:
            model.state = ModelState.ACTIVE
            model.active_since = now
            model.num_activations += 1
            if model.is_ahead:
                model.num_ahead += 1
            else:
                model.last_used = now
            if model is self._current:
                self._since = now
        return models

    def cancel(self, model: SimModel) -> None:
        """Nobody wants it any more."""
        self.link.cancel(model)
        self._memory.release(model)
        model.state = ModelState.COLD
        model.is_ahead = False

    def want(self, model: SimModel, now: int) -> bool:
        """Load a model unless it is here or coming; whether it is."""
        if model.state is ModelState.LOADING and model.is_ahead:
            self.link.hurry(model, _due(model), now)
        model.is_ahead = False
        if model.state in (ModelState.ACTIVE, ModelState.LOADING):
            return True
        model.state = ModelState.FETCHING
        if not self._memory.ensure_weights(model, now):
            self._device.stop_growing()
            return False
        self._load(model, _due(model), now)
        return True

    def _load(self, model: SimModel, due: int, now: int) -> None:
        self._memory.activate(model)
        self._device.bind(model)
        model.state = ModelState.LOADING
        self.link.start(model, due, now)

    def most_kv(self, model: SimModel) -> int:
        """Slabs of KV that the model can have at best; residents keep what they need at the least."""
        if model.kv_limit is not None:
            return model.kv_limit
        weights = model.weight_slabs
        if self._rules.is_resident:
            weights = sum(m.weight_slabs + (m is not model) for m in self._models.values())
        return self._memory.num_slabs - weights

    def _bring_wanted(self, now: int) -> None:
        """Those with the oldest requests first; who finds no room looks again when memory changes, when a
        busy model has been here for as long as it may count on, or when it may displace one."""
        absent = (ModelState.COLD, ModelState.FETCHING)
        wanted = [
            m
            for m in self._models.values()
            if (m.tickets or m.is_wanted) and (m.state in absent or m.is_ahead)
        ]
        results = [self.want(m, now) for m in sorted(wanted, key=lambda m: (rank_of(m), m.name))]
        if wanted and not all(results):
            dues = (self._memory.displaces_at(m) for m in wanted if m.state is ModelState.FETCHING)
            due = min((due for due in dues if due > now), default=NEVER)
            self.wake_at = min(due, self._end_of_residency(now))
        elif self._limits.load_ahead and not self.link.is_busy:
            self._load_ahead(now)

    def _load_ahead(self, now: int) -> None:
        """One that lives here comes before anybody asks, if there is room."""
        memory, threshold = self._memory, self._limits.idle_threshold
        cold = [m for m in self._models.values() if m.state is ModelState.COLD and m.is_at_home]
        if not cold:
            return
        demand = memory.expected_demand(now)
        most = ahead.room(memory.free, memory.num_slabs, demand)
        absent = [
            ahead.Absent(m.name, slabs_to_activate(m), m.return_chance(now, threshold))
            for m in cold
            if slabs_to_activate(m) <= most
        ]
        chosen = ahead.choose(absent, memory.free, memory.num_slabs, demand)
        if chosen is not None:
            model = self._models[chosen]
            model.is_ahead = True
            self._load(model, NEVER, now)

    def _end_of_residency(self, now: int) -> int:
        least = self._limits.min_residency
        ends = (first_after(m.active_since, least) for m in self._models.values() if m.is_active)
        return min((end for end in ends if end > now), default=NEVER)

    def stalled(self, now: int) -> None:
        """A running model lacks memory: that a neighbour has been here for long enough may change it."""
        self.wake_at = min(self.wake_at, self._end_of_residency(now))

    def _take_turns(self, now: int) -> None:
        contenders = [_contender(model) for model in self._models.values()]
        current, since = self._current, to_seconds(self._since)
        name = None if current is None else current.name
        choice = timeshare.decide(contenders, name, since, self._limits.quantum, to_seconds(now))
        for model in self._models.values():
            model.is_open = choice.is_open and model.name == choice.model
        if choice.model is None:
            return
        if choice.model != name:
            if current is not None:
                self._device.evict(current)
            self._current = self._models[choice.model]
            self._since = now
            self.want(self._current, now)
        end = first_after(self._since, self._limits.quantum)
        if end > now:
            self.wake_at = end


def _contender(model: SimModel) -> timeshare.Contender:
    waiting = next((job for job in model.tickets.values() if not job.is_admitted), None)
    return timeshare.Contender(
        model.name,
        None if waiting is None else to_seconds(waiting.arrival),
        is_busy=model.num_sequences > 0 or model.state is ModelState.LOADING,
    )


def _due(model: SimModel) -> int:
    """When the first token of a model's requests is due."""
    dues = [_next_due(job, model) for job in model.tickets.values()]
    return min(dues, default=NEVER)


def _next_due(job: Job, model: SimModel) -> int:
    return job.due if job.first_token is None else job.last_token + model.tpot
