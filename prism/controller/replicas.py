"""As many homes for a model as its share of device time needs. Pure."""

from __future__ import annotations

import math

from prism.controller.homes import Homes
from prism.controller.pressure import entry_of, lowest
from prism.controller.snapshot import ModelNeed

FULL = 0.9
TOLERATED = 0.01
"""Share of first tokens that may be late for want of the device: objectives are mostly promised to 99 %."""
CALMER = 0.5
"""Of what was asked of a model when it got one more home, what it must have fallen to before one goes: what
was late then would be late again."""
MERGE_PATIENCE = 5.0
"""Cooldowns before a home is given up: having one too many costs little, and getting it back costs a load."""


def fit_replicas(homes: Homes) -> None:
    """One home less where fewer suffice by far, one more where they do not; never two changes at a time.

    A share of time does not tell how long requests wait for it: where many come at once, their first tokens
    are late on a device that is idle most of the time. So late ones ask for a home, too, on a device that
    stays half free: bursts need idle time, and where there is none one home more only takes memory. What was
    late before the newest of several homes was ready asks for no other.
    """
    for model in homes.models.values():
        if model.tp > 1 or model.device is not None:
            continue
        count = len(homes.of(model.model))
        policy, before = homes.policy, _pressure(homes, model)
        may_grow = homes.moves_left > 0 and homes.may_grow(model)
        if may_grow and _is_too_much(homes, model, count):
            _replicate(homes, model, before - policy.gain)
        elif may_grow and _is_late(homes, model) and (count == 1 or model.is_still_late):
            _replicate(homes, model, before, policy.merge_below)
        elif _is_calm(homes, model, count) and homes.may_move(model, MERGE_PATIENCE):
            _merge(homes, model)


def _share(homes: Homes, model: ModelNeed, count: int) -> float:
    """Share of a device's time that the model takes at each of so many homes, on the slowest of its own."""
    slowest = min((float(homes.fleet.speed[place]) for place in homes.places(model.model)), default=1.0)
    return model.compute / count / slowest if count else 0.0


def _is_late(homes: Homes, model: ModelNeed) -> bool:
    """For itself: where a neighbour's steps are to blame it should move, not live there as well."""
    entry, places = homes.entries[model.model], homes.places(model.model)
    by_others = sum(homes.fleet.late_share(entry, place) for place in places) / max(1, len(places))
    return model.late - by_others > TOLERATED


def _is_calm(homes: Homes, model: ModelNeed, count: int) -> bool:
    """One home less would do."""
    share = _share(homes, model, count - 1)
    return count > 1 and share < homes.policy.merge_below and model.compute <= CALMER * model.replicated_at


def _is_too_much(homes: Homes, model: ModelNeed, count: int) -> bool:
    """Beyond doubt, or a device is full: no more than that can be measured, whatever is asked for."""
    share = _share(homes, model, count)
    return share * (1 - model.noise) > homes.policy.replicate_above or share >= FULL


def _merge(homes: Homes, model: ModelNeed) -> None:
    """Give up the home that is not in memory, or else the most pressed one, if the others can bear it."""
    places = homes.places(model.model)
    before, workers = homes.fleet.pressures(), homes.fleet.workers
    last = max(places, key=lambda place: (workers[place] not in model.resident, before[place]))
    after = homes.pressures_without(model, last)
    rest = [place for place in places if place != last]
    if after[rest].max() < max(homes.policy.replicate_above, float(before[rest].max())):
        homes.merge(model, last)


def _pressure(homes: Homes, model: ModelNeed) -> float:
    """Where it lives now, at most."""
    places = homes.places(model.model)
    return float(homes.fleet.pressures()[places].max()) if places else 0.0


def _replicate(homes: Homes, model: ModelNeed, most: float, most_busy: float = math.inf) -> None:
    """Where the pressure is least with one home more there, if that is less than `most`: of devices that are
    asked for less than a share of their time then.
    """
    entry = entry_of(model, len(homes.places(model.model)) + 1)
    able = homes.roomy(model, entry) & (homes.fleet.busy_with(entry) < most_busy)
    if not able.any():
        return
    added = homes.fleet.with_added(entry)
    place = lowest(added, able)
    if added[place] < most:
        homes.replicate(model, place)
