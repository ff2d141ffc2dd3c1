"""What an engine asks of a device: run a step, and tell later what it drew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prism.attention.kernels import KvView
from prism.engine.sampler import Sampled
from prism.engine.scheduler import Step
from prism.engine.sequence import Sequence


class InFlight(Protocol):
    """A step on the device. Steps of one lane run in the order in which they were queued."""

    @property
    def step(self) -> Step:
        """What was queued."""
        ...

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences for which it draws a token, in the order of `draws`."""
        ...

    def is_done(self) -> bool:
        """It has run."""
        ...

    def draws(self) -> list[Sampled]:
        """Its tokens; waits until it has run."""
        ...


class Runner(Protocol):
    """A model bound to its KV and its lane."""

    kv: KvView

    def run(self, step: Step) -> InFlight:
        """Queue a step: compute its KV and draw its tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that had run when it was handed out."""

    step: Step
    sampled: tuple[Sequence, ...]
    drawn: list[Sampled]

    def is_done(self) -> bool:
        """Always."""
        return True

    def draws(self) -> list[Sampled]:
        """See `InFlight.draws`."""
        return self.drawn
