"""Decides on which devices each model lives. Pure.

It starts from the homes as they are, and changes as little as it must:

1. A model without a home gets the device on which the pressure is least after adding it, among those with
   room. Live models come first, by descending demand.
2. A model that pinned ones leave no room goes where they leave it some, or loses that home if it has others.
3. A device with more live models than fit gives some away: what is not in memory first, then what asks
   least.
4. A model for whose load fewer homes suffice loses one; one whose home is too little gets another
   (replicas.py).
5. The most pressed device gives a model away, if that lowers the higher pressure of the two by more than
   `gain`, it is beyond `doubt` that the target stays below what the source was, it pays within `horizon`,
   and the model has lived there for `cooldown`.
6. A model of which nothing is in memory, and that nobody asks for, moves its home to a device that is better.

What has no room anywhere beside others is crowded: it lives where it fits alone, and its worker swaps.
What fits no device is infeasible, and lives on the largest, whose worker says so. So does the worker of what
has no room beside pinned models on any: it is shut out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from prism.controller.decisions import Plan
from prism.controller.homes import Homes
from prism.controller.pressure import Floats, entry_of, lowest
from prism.controller.replicas import FULL, fit_replicas
from prism.controller.snapshot import DeviceState, Home, ModelNeed, PlacementSnapshot, Policy
from prism.types import ModelId

MOST_DOUBT = 0.35
"""About a full device: two models that need half of it each come apart, however few requests say so."""


def decide(snapshot: PlacementSnapshot, now: float) -> Plan:
    """See the module's docstring."""
    homes = Homes(snapshot, now)
    _settle(homes)  # 1
    _leave_pinned(homes)  # 2
    _relieve_overfull(homes)  # 3
    fit_replicas(homes)  # 4
    while homes.moves_left and _relieve(homes):  # 5
        pass
    _rehome_idle(homes)  # 6
    return homes.plan()


def first_homes(
    models: tuple[ModelNeed, ...], devices: tuple[DeviceState, ...]
) -> dict[ModelId, tuple[Home, ...]]:
    """One for each model before anybody has asked for anything, by the loads that are expected, if any are.

    They hold back no move.
    """
    homes = decide(PlacementSnapshot(models, devices, policy=Policy(max_moves=0)), 0.0).homes
    return {model: tuple(Home(home.worker) for home in each) for model, each in homes.items()}


# --- 1: homes for those that have none ----------------------------------------------------------------


def _settle(homes: Homes) -> None:
    """As many homes as a model is split over, one at least."""
    missing = [m for m in homes.models.values() if len(homes.of(m.model)) < m.tp]
    demand = {m.model: homes.fleet.demand(homes.entries[m.model]) for m in missing}
    for model in sorted(
        missing,
        key=lambda m: (m.device is None, not m.is_live, -demand[m.model], -m.weights_bytes, m.model),
    ):
        while len(homes.of(model.model)) < model.tp:
            place = _best(homes, model)
            if place is None:
                homes.infeasible.add(model.model)
                break
            homes.give(model, place)


def _best(homes: Homes, model: ModelNeed) -> int | None:
    """The best device for one more home; None only if each device that is allowed has one already."""
    fleet, allowed = homes.fleet, homes.allowed(model)
    entry = entry_of(model, len(homes.of(model.model)) + 1)
    if not allowed.any():
        return None
    if not (holding := allowed & fleet.fits_alone(entry)).any():
        return lowest(-fleet.capacity, allowed)
    if not (able := holding & fleet.fits_beside_pinned(entry)).any():
        return lowest(fleet.with_added(entry), holding)
    if not model.is_live:
        return lowest(fleet.homeliness(entry), able)
    if (roomy := able & fleet.fits(entry)).any():
        return lowest(fleet.with_added(entry), roomy)
    homes.crowded.add(model.model)
    return lowest(fleet.with_added(entry), able)


# --- 2: no room beside pinned models ------------------------------------------------------------------


def _leave_pinned(homes: Homes) -> None:
    """At once: the worker refuses each request, also while it is in memory there still."""
    fleet = homes.fleet
    for model in homes.models.values():
        if model.device is not None or homes.is_busy(model):
            continue
        for place in homes.places(model.model):
            if fleet.is_shut_out(homes.entries[model.model], place):
                _leave(homes, model, place)


def _leave(homes: Homes, model: ModelNeed, place: int) -> None:
    fleet, entry = homes.fleet, homes.entries[model.model]
    able, roomy = homes.able(model, entry), homes.roomy(model, entry)
    if fleet.workers[place] in model.resident:  # migrations go where there is room
        able = roomy
    if able.any():
        there = fleet.with_added(entry) if model.is_live else fleet.homeliness(entry)
        homes.move(model, place, lowest(there, roomy if roomy.any() else able), 0.0)
        return
    others = [other for other in homes.places(model.model) if other != place]
    if len(others) >= model.tp and not all(fleet.is_shut_out(entry, other) for other in others):
        homes.merge(model, place)


# --- 3: what does not fit -----------------------------------------------------------------------------


def _relieve_overfull(homes: Homes) -> None:
    """Move what must leave. What has no room anywhere is crowded and stays."""
    for place in map(int, np.flatnonzero(homes.fleet.excess() > 0)):
        excess = float(homes.fleet.excess()[place])
        for model in _by_ease(homes, place):
            if excess <= 0:
                break
            excess -= homes.fleet.need(homes.entries[model.model], place)
            _push_out(homes, model, place)


def _by_ease(homes: Homes, place: int) -> list[ModelNeed]:
    """Live models of a device: what is not in memory, and asks least, is moved most easily."""
    worker = homes.fleet.workers[place]
    models = [homes.models[model] for model in homes.living(place)]
    able = [model for model in models if model.is_live and not homes.is_busy(model)]
    return sorted(able, key=lambda m: (worker in m.resident, homes.fleet.demand(homes.entries[m.model])))


def _push_out(homes: Homes, model: ModelNeed, place: int) -> None:
    entry = homes.entries[model.model]
    if (roomy := homes.roomy(model, entry)).any():
        if homes.may_move(model) or homes.fleet.workers[place] not in model.resident:
            homes.move(model, place, lowest(homes.fleet.with_added(entry), roomy), 0.0)
    else:
        homes.crowded.add(model.model)


# --- 5: pressure --------------------------------------------------------------------------------------


def _relieve(homes: Homes) -> bool:
    """The best move from the most pressed device that has one; False if there is none worth it."""
    pressures, is_up = homes.fleet.pressures(), homes.fleet.is_up
    if not is_up.any():
        return False
    least = float(pressures[is_up].min())
    for place in map(int, np.argsort(-pressures, kind="stable")):
        pressure = float(pressures[place])
        if pressure - least <= _worth(homes, pressure):  # no device can gain more
            return False
        if _relieve_device(homes, place, pressure):
            return True
    return False


def _worth(homes: Homes, pressure: float) -> float:
    """What a move must gain: beyond 1 pressures are noisy in proportion."""
    return homes.policy.gain * max(1.0, pressure)


def _doubt(homes: Homes, place: int, target: int) -> float:
    """By chance a device is full for a moment, but one that stays so hides how much is asked for."""
    doubt = homes.policy.doubt * homes.fleet.noise(place, target)
    is_full = homes.fleet.parts()[1][place] >= FULL
    return min(doubt, MOST_DOUBT) if is_full else doubt


def _relieve_device(homes: Homes, place: int, pressure: float) -> bool:
    best: tuple[float, ModelNeed, int] | None = None
    for name in homes.living(place):
        model = homes.models[name]
        if not model.is_live or model.device is not None or not homes.may_move(model):
            continue
        gain, rest, target = _gain(homes, model, place, pressure)
        cost = model.move_seconds if homes.fleet.workers[place] in model.resident else 0.0
        worth = _worth(homes, pressure)
        is_sure = rest > worth + _doubt(homes, place, target)
        is_paid = gain * homes.policy.horizon >= cost
        if gain > worth and is_sure and is_paid and (best is None or gain > best[0]):
            best = gain, model, target
    if best is None:
        return False
    gain, model, target = best
    homes.move(model, place, target, gain)
    return True


class _Gain(NamedTuple):
    """What a move would change."""

    gain: float
    """By how much the higher pressure of the two devices falls."""
    rest: float
    """By how much the target's stays below what the source's was: that is what chance may turn round."""
    target: int


def _gain(homes: Homes, model: ModelNeed, place: int, pressure: float) -> _Gain:
    """To the target where it is most."""
    entry = homes.entries[model.model]
    roomy = homes.roomy(model, entry)
    if not roomy.any():
        return _Gain(0.0, 0.0, place)
    added: Floats = homes.fleet.with_added(entry)
    target = lowest(added, roomy)
    rest = pressure - float(added[target])
    return _Gain(min(rest, pressure - homes.fleet.with_removed(entry, place)), rest, target)


# --- 6: idle models -----------------------------------------------------------------------------------


def _rehome_idle(homes: Homes) -> None:
    """To where each would go best if somebody asked for it, with the inertia of a move."""
    fleet = homes.fleet
    for model in homes.models.values():
        if model.is_live or model.resident or model.device is not None or not homes.may_move(model):
            continue
        entry, places = homes.entries[model.model], homes.places(model.model)
        able = homes.able(model, entry)
        if len(places) != 1 or not able.any():
            continue
        there = fleet.homeliness(entry)
        target, place = lowest(there, able), places[0]
        gain = float(there[place] - there[target] - entry.weights / fleet.capacity[place])
        if gain > homes.policy.gain:
            homes.move(model, place, target, gain)
