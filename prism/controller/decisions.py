"""What placement decides. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism.controller.snapshot import Home
from prism.types import ModelId, WorkerId


@dataclass(frozen=True, slots=True)
class Rehome:
    """Another home for a model that is not in memory at `source`, or has none: only routes change."""

    model: ModelId
    source: WorkerId | None
    target: WorkerId


@dataclass(frozen=True, slots=True)
class Move:
    """A migration."""

    model: ModelId
    source: WorkerId
    target: WorkerId
    gain: float
    """By how much it lowers the higher pressure of the two devices; 0 if it had to be."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """One more home."""

    model: ModelId
    target: WorkerId
    compute: float = field(default=0.0, compare=False)
    """What was asked of the model then, in devices."""


@dataclass(frozen=True, slots=True)
class Merge:
    """One home less."""

    model: ModelId
    source: WorkerId


Decision = Rehome | Move | Replicate | Merge


@dataclass(frozen=True, slots=True)
class Plan:
    """What to change, and how it will be then."""

    decisions: tuple[Decision, ...]
    homes: dict[ModelId, tuple[Home, ...]]
    crowded: frozenset[ModelId]
    """They fit a device, but not beside what else is asked for: their workers swap."""
    infeasible: frozenset[ModelId]
    """They fit no device, or fewer than they are split over."""
    shut_out: frozenset[ModelId]
    """They live where pinned models leave them no room: their workers refuse them."""
    pressures: dict[WorkerId, float]
