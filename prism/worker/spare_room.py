"""Fills memory that nobody uses with models that live here, and takes it back; ahead.py says which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from prism.types import ModelId, ModelState
from prism.worker import ahead
from prism.worker.device import Device
from prism.worker.holdings import Holdings
from prism.worker.models import Model
from prism.worker.reclaimer import Reclaimer, slabs_to_activate
from prism.worker.residency import Residency

LOOK_SECONDS = 1.0
"""Between two looks at what could come, when nothing else has changed."""


class SpareRoom:
    """One model at a time, last on the link; whoever lacks memory calls its load off or evicts it."""

    def __init__(
        self,
        device: Device,
        models: Mapping[str, Model],
        holdings: Holdings,
        residency: Residency,
        reclaimer: Reclaimer,
        evict: Callable[[Model], None],
        learn: Callable[[Model], None],
        *,
        is_used: bool,
    ) -> None:
        """`learn` reads what a model's directory tells. `is_used`: the mode and the configuration want it."""
        self._pool = device.pool
        self._num_slabs = device.num_slabs
        self._models = models
        self._holdings = holdings
        self._residency = residency
        self._reclaimer = reclaimer
        self._evict = evict
        self._learn = learn
        self._is_used = is_used
        self._next_look = self._next_look_at_caches = 0.0

    def changed(self) -> None:
        """Memory or models have: it is worth a look."""
        self._next_look = 0.0

    def on_homes(self, names: Collection[str]) -> None:
        """These models live here; others that have come ahead leave."""
        self.changed()
        for model in self._models.values():
            model.is_at_home = model.name in names
            if not model.is_ahead or model.is_at_home or self._holdings.is_asked_for(model):
                continue
            if model.is_active:
                self._evict(model)
            elif model.load is not None:
                self._residency.cancel_load(model)
            else:
                self._residency.forget(model)

    def fill(self, now: float) -> None:
        """Begin with one more model, unless something is on its way in or somebody waits for memory."""
        if not self._is_used or now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        moving = [m for m in self._models.values() if m.load is not None or m.state is ModelState.FETCHING]
        if not moving:
            self._begin(now)
        elif len(moving) == 1 and moving[0].is_ahead and moving[0].is_waiting_for_slabs:
            is_fitting = slabs_to_activate(moving[0]) <= self._num_free
            if is_fitting and self._choose(moving, now, self._holdings.caches(now)) is not None:
                self._residency.try_load(moving[0], self._reclaimer, now)
            else:
                self._residency.forget(moving[0])

    def _begin(self, now: float) -> None:
        """A full device asks whenever a request has ended: it looks at models and caches once in a while."""
        caches: dict[ModelId, ahead.Cached] = {}
        if now >= self._next_look_at_caches:
            self._next_look_at_caches = now + LOOK_SECONDS
            caches = self._holdings.caches(now)
        if not caches and self._room(now) <= 0:
            return
        absent = [m for m in self._models.values() if self._may_come(m)]
        chosen = self._choose(absent, now, caches) if absent else None
        if chosen is not None:
            self._take_from_caches(self._models[chosen], caches, now)
            self._models[chosen].is_ahead = True
            self._residency.want(self._models[chosen])

    @property
    def _num_free(self) -> int:
        """With those that are on their way back."""
        return self._pool.num_free + self._pool.num_retiring

    def _room(self, now: float) -> float:
        return ahead.room(self._num_free, self._num_slabs, self._reclaimer.expected_demand(now))

    def _take_from_caches(self, chosen: Model, caches: Mapping[ModelId, ahead.Cached], now: float) -> None:
        """What it lacks, of the least useful first. What they keep stands for what is to stay free."""
        absent, lacking = self._absent(chosen, now), slabs_to_activate(chosen) - self._num_free
        for name, cache in sorted(caches.items(), key=lambda item: item[1].harm):
            if lacking <= 0 or not absent.may_have(cache):
                return
            lacking -= self._reclaimer.take_cache(self._models[name], min(lacking, cache.slabs))

    def _may_come(self, model: Model) -> bool:
        """Its packed weights are there, and no administrator has sent it away."""
        is_absent = model.state is ModelState.COLD and model.is_held and not model.is_barred
        if not is_absent or not model.is_at_home or model.is_sent_away:
            return False
        self._learn(model)
        return model.profile is not None and not model.arena_slabs

    def _absent(self, model: Model, now: float) -> ahead.Absent:
        chance = self._holdings.return_chance(model, now)
        return ahead.Absent(model.name, slabs_to_activate(model), chance, self._holdings.load_seconds(model))

    def _choose(
        self, models: Collection[Model], now: float, caches: Mapping[ModelId, ahead.Cached]
    ) -> ModelId | None:
        absent = [self._absent(model, now) for model in models]
        demand = self._reclaimer.expected_demand(now)
        return ahead.choose(absent, self._num_free, self._num_slabs, demand, caches.values())
