"""Which model has a device to itself. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Waiting(NamedTuple):
    """A request that has not been admitted."""

    arrival: float
    prompt: float
    """Seconds of the device."""
    decodes: float
    """Its part of those of a batch."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits for a model of the device, oldest first."""

    waiting: Sequence[Waiting]
    activation: float
    """Seconds until it is there, if it comes next."""


@dataclass(frozen=True, slots=True)
class Present:
    """Who has the device."""

    model: ModelId | None
    running: float
    """Seconds until what it runs has ended."""
    left: float
    """Of its quantum."""


def starts_in(
    queues: Mapping[ModelId, Queue], present: Present, quantum: float, batch: int, model: ModelId
) -> float:
    """Seconds until the prompt of the last that waits for `model` is next, if nobody else comes.

    Turns go as `decide` gives them: a model takes a batch at once, and more until its quantum has passed or,
    while nobody else waits, for ever; then it ends all that it has taken.
    """
    rest = {name: deque(queue.waiting) for name, queue in queues.items()}
    clock, left, running, current = 0.0, present.left, present.running, present.model
    while True:
        own = deque[Waiting]() if current is None else rest[current]
        others = {name: waiting[0] for name, waiting in rest.items() if waiting and name != current}
        prompts, used, count = 0.0, 0.0, 0
        while own and (not others or used < left or (left > 0 and count < batch)):
            if current == model and len(own) == 1:
                return clock + prompts
            taken = own.popleft()
            prompts, used, count = prompts + taken.prompt, used + taken.prompt + taken.decodes, count + 1
        current = min(others, key=lambda name: (others[name].arrival, name))
        clock += max(used, running) + queues[current].activation
        left, running = quantum, 0.0
