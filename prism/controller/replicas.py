"""As many homes for a model as its share of device time needs. Pure."""

from __future__ import annotations

from prism.controller.homes import Homes
from prism.controller.pressure import entry_of, lowest
from prism.controller.snapshot import ModelNeed

FULL = 0.9
MERGE_PATIENCE = 5.0
"""Cooldowns before a home is given up: having one too many costs little, and getting it back costs a load."""


def fit_replicas(homes: Homes) -> None:
    """One home less where fewer suffice by far, one more where they do not; never two changes at a time."""
    for model in homes.models.values():
        if model.tp > 1 or model.device is not None or not homes.may_move(model):
            continue
        count = len(homes.of(model.model))
        if count > 1 and _share(homes, model, count - 1) < homes.policy.merge_below:
            if homes.may_move(model, MERGE_PATIENCE):
                _merge(homes, model)
        elif homes.moves_left and _is_too_much(homes, model, _share(homes, model, count)):
            _replicate(homes, model)


def _share(homes: Homes, model: ModelNeed, count: int) -> float:
    """Share of a device's time that the model takes at each of so many homes, on the slowest of its own."""
    slowest = min((float(homes.fleet.speed[place]) for place in homes.places(model.model)), default=1.0)
    return model.compute / count / slowest if count else 0.0


def _is_too_much(homes: Homes, model: ModelNeed, share: float) -> bool:
    """Beyond doubt, or a device is full: no more than that can be measured, whatever is asked for."""
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


def _replicate(homes: Homes, model: ModelNeed) -> None:
    """Where the pressure is least after adding it, if that is less than where it lives now."""
    places = homes.places(model.model)
    entry = entry_of(model, len(places) + 1)
    roomy = homes.roomy(model, entry)
    if not roomy.any():
        return
    added = homes.fleet.with_added(entry)
    place = lowest(added, roomy)
    if added[place] < homes.fleet.pressures()[places].max() - homes.policy.gain:
        homes.replicate(model, place)
