"""One model's way from a device to another, step by step. Pure: events in, effects out.

    LOADING --target active--> DRAINING --source idle, or late--> EVICTING --source cold--> done
       |                          |                                  |
       target fails or dies,      source dies: done                  refused: DRAINING again
       takes too long: over,      target dies: back to the source,   source dies: done
       the source stays home      which has served all along         target dies: back to the source
       source dies: the target
       is home at once

A replica has no source, and is done when its target is active. A merge has no target, and begins with
draining. While a model is loading, all requests go to the source; from then on new ones go to the target.
A source that is not idle in time returns what it has, and the gateways send it to the target with its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple, assert_never

from prism.types import ModelId, WorkerId

CALLED_OFF = "called off"
"""Why a migration has ended that an administrator did not want any more."""
LOAD_SECONDS = 120.0
EVICT_SECONDS = 30.0
SETTLE_SECONDS = 1.0
"""Gateways may send to the source for a moment after the routes have changed."""


class Phase(StrEnum):
    """How far it has come."""

    LOADING = "loading"
    DRAINING = "draining"
    EVICTING = "evicting"


@dataclass(frozen=True, slots=True)
class Migration:
    """A move (both), a replica (target alone) or a merge (source alone) under way."""

    model: ModelId
    source: WorkerId | None
    target: WorkerId | None
    phase: Phase
    since: float
    """When the phase began."""


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TargetActive:
    """The model can answer there."""


@dataclass(frozen=True, slots=True)
class TargetFailed:
    """It could not be loaded."""

    reason: str


@dataclass(frozen=True, slots=True)
class SourceIdle:
    """The source says that it has no unfinished requests of the model."""


@dataclass(frozen=True, slots=True)
class SourceCold:
    """The model has left its memory."""


@dataclass(frozen=True, slots=True)
class EvictRefused:
    """Requests have come meanwhile."""


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker has died, whichever."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class CalledOff:
    """An administrator wants something else of the model."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes."""


Event = TargetActive | TargetFailed | SourceIdle | SourceCold | EvictRefused | WorkerEnded | CalledOff | Tick

# --- effects --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ActivateAt:
    """Have it loaded."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class EvictAt:
    """Have it evicted; with `returns` even if it has requests, which come back to their gateways."""

    worker: WorkerId
    returns: bool


@dataclass(frozen=True, slots=True)
class Switch:
    """One home instead of another, or more, or less."""

    old: WorkerId | None
    new: WorkerId | None


@dataclass(frozen=True, slots=True)
class Over:
    """It has ended; `failure` says why it has come to nothing."""

    failure: str | None = None


Effect = ActivateAt | EvictAt | Switch | Over


class Step(NamedTuple):
    """The migration after an event (None: it is over), and what to do in this order."""

    after: Migration | None
    effects: tuple[Effect, ...] = ()


def begin(model: ModelId, source: WorkerId | None, target: WorkerId | None, now: float) -> Step:
    """Start a move, a replica or a merge."""
    assert source != target
    if target is not None:
        return Step(Migration(model, source, target, Phase.LOADING, now), (ActivateAt(target),))
    return Step(Migration(model, source, None, Phase.DRAINING, now), (Switch(source, None),))


def advance(migration: Migration, event: Event, now: float, drain_seconds: float) -> Step:
    """What an event changes. Events that do not concern the phase change nothing."""
    match migration.phase:
        case Phase.LOADING:
            return _loading(migration, event, now)
        case Phase.DRAINING:
            return _draining(migration, event, now, drain_seconds)
        case Phase.EVICTING:
            return _evicting(migration, event, now)
        case _:
            assert_never(migration.phase)


def _loading(migration: Migration, event: Event, now: float) -> Step:
    source, target = migration.source, migration.target
    assert target is not None
    match event:
        case TargetActive():
            switch = Switch(source, target)
            if source is None:
                return Step(None, (switch, Over()))
            return Step(replace(migration, phase=Phase.DRAINING, since=now), (switch,))
        case TargetFailed(reason):
            return Step(None, (Over(reason),))
        case WorkerEnded(worker) if worker == target:
            return Step(None, (Over(f"{target} ended while it loaded the model"),))
        case WorkerEnded(worker) if worker == source:
            return Step(None, (Switch(source, target), Over()))
        case CalledOff():
            return Step(None, (EvictAt(target, returns=True), Over(CALLED_OFF)))
        case Tick() if now - migration.since >= LOAD_SECONDS:
            failure = f"{target} has not loaded it within {LOAD_SECONDS:g} s"
            return Step(None, (EvictAt(target, returns=True), Over(failure)))
        case _:
            return Step(migration)


def _draining(migration: Migration, event: Event, now: float, drain_seconds: float) -> Step:
    source = migration.source
    assert source is not None
    waited = now - migration.since
    evicting = replace(migration, phase=Phase.EVICTING, since=now)
    match event:
        case SourceIdle() if waited >= SETTLE_SECONDS:
            return Step(evicting, (EvictAt(source, returns=False),))
        case SourceCold() if waited >= SETTLE_SECONDS:  # under pressure it was evicted already
            return Step(None, (Over(),))
        case Tick() if waited >= drain_seconds:
            return Step(evicting, (EvictAt(source, returns=True),))
        case _:
            return _after_switch(migration, event)


def _evicting(migration: Migration, event: Event, now: float) -> Step:
    match event:
        case SourceCold():
            return Step(None, (Over(),))
        case EvictRefused():
            return Step(replace(migration, phase=Phase.DRAINING, since=now))
        case Tick() if now - migration.since >= EVICT_SECONDS:
            failure = f"{migration.source} has not evicted it within {EVICT_SECONDS:g} s"
            return Step(None, (Over(failure),))
        case _:
            return _after_switch(migration, event)


def _after_switch(migration: Migration, event: Event) -> Step:
    match event:
        case WorkerEnded(worker) if worker == migration.source:
            return Step(None, (Over(),))
        case WorkerEnded(worker) if worker == migration.target:
            failure = f"{worker} ended before the source was evicted"
            return Step(None, (Switch(migration.target, migration.source), Over(failure)))
        case CalledOff():
            return Step(None, (Over(CALLED_OFF),))
        case _:
            return Step(migration)
