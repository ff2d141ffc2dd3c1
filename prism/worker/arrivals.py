"""How models come in: what the agent and the threads of loads tell, and what is loaded next.

The states themselves change in residency.py; what is loaded before anybody asks is chosen by spare_room.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, assert_never

from prism.errors import Unavailable
from prism.types import Bytes, ModelId, ModelState
from prism.weights.registrations import Registrations
from prism.weights.transfers import NEVER
from prism.worker.endings import Endings
from prism.worker.loading import JobEvent, Loaded, Unloaded
from prism.worker.models import Model, likely_order
from prism.worker.residency import load_error
from prism.worker.spare_room import SpareRoom
from prism.worker.stepper import Stepper

if TYPE_CHECKING:
    from prism.worker.loop import Worker

ARRIVAL_SECONDS = 0.001
"""Between two looks at what has arrived of a model that requests wait for; a layer of 8B takes 8 ms."""


class Arrivals:
    """Of one worker's models."""

    def __init__(
        self,
        worker: Worker,
        stepper: Stepper,
        endings: Endings,
        spare_room: SpareRoom,
        registrations: Registrations | None,
        clock: Callable[[], float],
    ) -> None:
        self._worker = worker
        self._stepper = stepper
        self._endings = endings
        self._spare_room = spare_room
        self._registrations = registrations
        self._clock = clock
        self._last_load = 0.0
        """When the latest one ended, well or not."""

    # --- what is told ---------------------------------------------------------------------------------

    def packed(self, model: Model) -> None:
        """The agent holds its packed weights, as it was asked to."""
        self._worker.residency.packed(model)
        self._spare_room.changed()

    def held(self, model: Model, size: Bytes, *, may_live_here: bool) -> None:
        """The agent holds its packed weights, whoever asked for them."""
        model.is_held = True
        self._spare_room.changed()
        if self._registrations is not None and may_live_here:
            self._registrations.announce(ModelId(model.name), size)

    def packing_failed(self, model: Model, reason: str) -> None:
        """The checkpoint is unusable; whoever does not wait for it learns of it when he asks."""
        if model.state is ModelState.FETCHING:
            self._worker.residency.fail(model, Unavailable(reason))
            self._failed(model)

    def _failed(self, model: Model) -> None:
        """Refuse its requests; if it was pinned, others may have the room that was kept for it."""
        self._endings.model_failed(model)
        self._worker.room_changed()

    def job_ended(self, event: JobEvent) -> None:
        """A load or an unmapping."""
        model = self._worker.models[event.model]
        match event:
            case Loaded():
                self._loaded(model, event)
            case Unloaded():
                self._worker.residency.unloaded(model, event)
            case _:
                assert_never(event)

    def _loaded(self, model: Model, event: Loaded) -> None:
        worker = self._worker
        if load_error(model, event) is not None:
            self._stepper.drop_early(model)
        worker.residency.loaded(model, event)
        had_link_alone = self._had_link_alone(event)
        if model.is_active:  # the first time, kernels are compiled and pages come in
            is_alone = had_link_alone and model.num_activations > 1
            worker.costs.loaded(model.name, event.seconds, is_alone=is_alone)
        self._first_weights_arrived(model)
        if self._registrations is not None:
            self._registrations.prefer(likely_order(worker.models.values()))
        if model.state is ModelState.FAILED:
            self._failed(model)
        else:
            worker.capacities_changed()

    def _had_link_alone(self, event: Loaded) -> bool:
        """Whether no other load was under way at any moment of one that has just ended."""
        before, self._last_load = self._last_load, self._clock()
        others = [model for model in self._worker.models.values() if model.load is not None]
        return not others and before <= self._last_load - event.seconds

    # --- work -----------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Bring in what is wanted, those with the oldest requests first; then what may come ahead."""
        worker = self._worker
        worker.residency.unmap_arenas()
        tenants = worker.tenancy.wanted(worker, now) if worker.rules.is_exclusive else None
        active = ModelState.ACTIVE  # of those, nothing is looked at: this is asked each round
        others = [m for m in worker.models.values() if m.state is not active or m.is_ahead or m.is_sent_away]
        wanted = [m for m in others if worker.holdings.is_asked_for(m)] if tenants is None else tenants
        for model in wanted:
            model.is_ahead = model.is_sent_away = False
        absent = [model for model in wanted if not model.is_active]
        for model in sorted(absent, key=lambda m: (worker.reclaimer.rank(m), m.name)):
            self._bring(model, now)
        for model in others:
            if model.load is not None:
                tickets = worker.requests.of_model(model.name)
                model.load.deadline = min((t.due for t in tickets), default=NEVER)
                if not model.is_readable and model.load.groups_arrived:
                    self._first_weights_arrived(model)
        self._spare_room.fill(now)

    def _bring(self, model: Model, now: float) -> None:
        worker, before = self._worker, model.state
        worker.learn(model)
        worker.residency.want(model)
        worker.residency.try_load(model, worker.reclaimer, now)
        if model.state is not before:
            worker.places_changed()
            if model.state is ModelState.FAILED:
                self._failed(model)

    def _first_weights_arrived(self, model: Model) -> None:
        """Its requests may enter, and what its steps gain by can be prepared."""
        if model.engine is not None and not model.is_readable and (model.load is not None or model.is_active):
            model.is_readable = True
            if model.load is not None:
                self._worker.host.open(model, model.load.digest)
            self._worker.places_changed()
            self._worker.device.backend.expect(model.engine.runner)

    def next_looks(self, patience: float, now: float) -> Iterator[float]:
        """When to look again even if nothing is told; who lacks memory does so after `patience` seconds."""
        for model in self._worker.models.values():
            is_asked_for = self._worker.holdings.is_asked_for(model)
            if model.state is ModelState.FAILED and is_asked_for and not model.is_barred:
                yield model.retry_at
            if model.is_waiting_for_slabs:
                yield now + patience
            if model.load is not None and self._worker.requests.has_any(model.name):
                yield now + ARRIVAL_SECONDS
