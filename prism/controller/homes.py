"""One round of placement in the making: homes, and what they mean for the devices. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prism.controller.decisions import Decision, Merge, Move, Plan, Rehome, Replicate
from prism.controller.pressure import Entry, Fleet, Floats, Mask, entry_of
from prism.controller.snapshot import Home, ModelNeed, PlacementSnapshot
from prism.types import ModelId, WorkerId

MOST_DOUBLINGS = 5
"""A model that has moved again and again stays for 32 cooldowns."""


class Homes:
    """Where models live; changes with each decision, and keeps them."""

    def __init__(self, snapshot: PlacementSnapshot, now: float) -> None:
        self.policy = snapshot.policy
        self.models = {model.model: model for model in snapshot.models}
        self.fleet = fleet = Fleet(snapshot.devices, sum(model.request_rate for model in snapshot.models))
        self.entries: dict[ModelId, Entry] = {}
        self.crowded: set[ModelId] = set()
        self.infeasible: set[ModelId] = set()
        self.moves_left = snapshot.policy.max_moves
        self._busy = snapshot.busy
        self._now = now
        self._homes: dict[ModelId, tuple[Home, ...]] = {}
        self._living: list[set[ModelId]] = [set() for _ in snapshot.devices]
        self._decisions: list[Decision] = []
        for model in snapshot.models:
            known = tuple(h for h in snapshot.homes.get(model.model, ()) if h.worker in fleet.index)
            is_right = model.device is None or all(home.worker == model.device for home in known)
            self._set(model.model, known if is_right else ())

    def plan(self) -> Plan:
        """How it has turned out."""
        pressures = self.fleet.pressures()
        shut_out = set()
        for model in self._homes:
            entry, places = self.entries[model], self.places(model)
            if not all(self.fleet.holds(entry, place) for place in places):
                self.infeasible.add(model)
            if any(self.fleet.is_shut_out(entry, place) for place in places):
                shut_out.add(model)
        return Plan(
            tuple(self._decisions),
            dict(self._homes),
            frozenset(self.crowded - shut_out),
            frozenset(self.infeasible),
            frozenset(shut_out),
            {worker: float(pressures[place]) for worker, place in self.fleet.index.items()},
        )

    # --- looking --------------------------------------------------------------------------------------

    def of(self, model: ModelId) -> tuple[Home, ...]:
        """A model's homes."""
        return self._homes[model]

    def places(self, model: ModelId) -> list[int]:
        """The devices of its homes."""
        return [self.fleet.index[home.worker] for home in self._homes[model]]

    def living(self, place: int) -> list[ModelId]:
        """Who lives on a device."""
        return sorted(self._living[place])

    def may_move(self, model: ModelNeed, patience: float = 1.0) -> bool:
        """It is not being moved, and was not lately. Each move that soon follows another doubles the wait."""
        if model.model in self._busy:
            return False
        wait = self.policy.cooldown * patience
        waits = ((h.since, 2.0 ** min(h.num_moves, MOST_DOUBLINGS)) for h in self._homes[model.model])
        return all(self._now - since >= wait * times for since, times in waits)

    def may_grow(self, model: ModelNeed) -> bool:
        """It is not being moved, and if it has several homes, each had some time to show what it is good for.

        A home more takes nothing away: a model may have it at once where it was just put. But what has come
        to nothing waits like a move, or it would be tried in each round, in the place of others.
        """
        homes = self._homes[model.model]
        wait = self.policy.horizon / 3 if len(homes) > 1 else 0.0
        if any(home.has_failed for home in homes):
            wait = self.policy.cooldown
        return model.model not in self._busy and all(self._now - home.since >= wait for home in homes)

    def is_busy(self, model: ModelNeed) -> bool:
        """It is being moved."""
        return model.model in self._busy

    def allowed(self, model: ModelNeed) -> Mask:
        """Devices that are up, or all if none is; where the model is wanted; and without a home of it."""
        fleet = self.fleet
        allowed = fleet.is_up.copy() if fleet.is_up.any() else np.ones_like(fleet.is_up)
        if model.device is not None:
            allowed = np.array([worker == model.device for worker in fleet.workers])
        allowed[self.places(model.model)] = False
        return allowed

    def roomy(self, model: ModelNeed, entry: Entry) -> Mask:
        """Of those the ones that are up and have room for it beside what lives there."""
        return np.asarray(self.allowed(model) & self.fleet.is_up & self.fleet.fits(entry))

    def able(self, model: ModelNeed, entry: Entry) -> Mask:
        """Those that are up and have room for it if all that may gives way."""
        return np.asarray(self.allowed(model) & self.fleet.is_up & self.fleet.fits_beside_pinned(entry))

    # --- deciding -------------------------------------------------------------------------------------

    def give(self, model: ModelNeed, place: int) -> None:
        """A home for a model that has none, or too few."""
        target = self.fleet.workers[place]
        self._decisions.append(Rehome(model.model, None, target))
        self._set(model.model, (*self._homes[model.model], Home(target, self._now)))

    def move(self, model: ModelNeed, source: int, target: int, gain: float) -> None:
        """A migration if it is in memory there, while this round has any left; else a change of routes."""
        here, there = self.fleet.workers[source], self.fleet.workers[target]
        (home,) = (each for each in self._homes[model.model] if each.worker == here)
        is_migration = here in model.resident
        if is_migration and not self.moves_left:
            return
        if is_migration:
            self.moves_left -= 1
            self._decisions.append(Move(model.model, here, there, gain))
        else:
            self._decisions.append(Rehome(model.model, here, there))
        is_counted = is_migration or model.is_ahead  # that one is loaded again
        moved = home.moved(there, self._now, self.policy.cooldown) if is_counted else Home(there, self._now)
        self._set(model.model, (*self._without(model, here), moved))

    def replicate(self, model: ModelNeed, place: int) -> None:
        """One home more."""
        self.moves_left -= 1
        target = self.fleet.workers[place]
        self._decisions.append(Replicate(model.model, target, model.compute))
        self._set(model.model, (*self._homes[model.model], Home(target, self._now)))

    def merge(self, model: ModelNeed, place: int) -> None:
        """One home less; the others stay what they are for a while."""
        source = self.fleet.workers[place]
        self._decisions.append(Merge(model.model, source))
        rest = tuple(Home(home.worker, self._now, home.num_moves) for home in self._without(model, source))
        self._set(model.model, rest)

    def pressures_without(self, model: ModelNeed, place: int) -> Floats:
        """Of all devices, if the model had this home no more."""
        before = self._homes[model.model]
        self._set(model.model, self._without(model, self.fleet.workers[place]))
        pressures = self.fleet.pressures()
        self._set(model.model, before)
        return pressures

    def _without(self, model: ModelNeed, worker: WorkerId) -> tuple[Home, ...]:
        return tuple(home for home in self._homes[model.model] if home.worker != worker)

    def _set(self, model: ModelId, homes: Iterable[Home]) -> None:
        fleet = self.fleet
        for home in self._homes.get(model, ()):
            fleet.remove(self.entries[model], fleet.index[home.worker])
            self._living[fleet.index[home.worker]].discard(model)
        self._homes[model] = homes = tuple(homes)
        entry = self.entries[model] = entry_of(self.models[model], len(homes))
        for home in homes:
            fleet.add(entry, fleet.index[home.worker])
            self._living[fleet.index[home.worker]].add(model)
