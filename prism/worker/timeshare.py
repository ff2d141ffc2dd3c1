"""Which model has a device to itself. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism.types import ModelId


@dataclass(frozen=True, slots=True)
class Contender:
    """A model of the device."""

    model: ModelId
    oldest_waiting: float | None
    """Arrival of its oldest request that has not been admitted, or of the command to load it."""
    is_busy: bool
    """It has admitted requests."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The model that should be there, and whether it takes more requests."""

    model: ModelId | None
    is_open: bool


def decide(
    contenders: Sequence[Contender], current: ModelId | None, since: float, quantum: float, now: float
) -> Choice:
    """Who has the device now.

    1. Nobody waits for another model: the present one stays.
    2. The present one has nothing to do: the model of the oldest waiting request comes.
    3. Its quantum has passed: it takes no more requests, and ends those that it has.
    4. Else it goes on.
    """
    others = [c for c in contenders if c.model != current and c.oldest_waiting is not None]
    if not others:  # 1
        return Choice(current, is_open=True)
    present = next((c for c in contenders if c.model == current), None)
    has_passed = now - since >= quantum
    if present is None or (not present.is_busy and (has_passed or present.oldest_waiting is None)):  # 2
        return Choice(min(others, key=lambda c: (c.oldest_waiting, c.model)).model, is_open=True)
    return Choice(current, is_open=not has_passed)  # 3, 4
