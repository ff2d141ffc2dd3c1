"""What an engine asks of a device: run a step, and tell later what it drew."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from prism.attention.kernels import KvView
from prism.engine.sampler import Sampled
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.types import Bytes


class InFlight(Protocol):
    """A step on its way: first launched, piece by piece, then run by the device.

    Steps of one lane run in the order in which they were launched.
    """

    @property
    def step(self) -> Step:
        """What is run."""
        ...

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Sequences for which it draws a token, in the order of `draws`."""
        ...

    @property
    def is_begun(self) -> bool:
        """Some of it is on the device."""
        ...

    @property
    def is_launched(self) -> bool:
        """All of it is on the device."""
        ...

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """Launch some more of it, see `Pieces.advance`; whether anything came of it."""
        ...

    def is_done(self) -> bool:
        """It has run."""
        ...

    def draws(self) -> Sampled:
        """Its tokens; waits until it has run."""
        ...


class Runner(Protocol):
    """A model bound to its KV and its lane."""

    kv: KvView

    def run(self, step: Step, *, is_apart: bool = False) -> InFlight:
        """A step that computes KV and draws tokens; nothing of it is launched yet.

        On one lane a step is launched in full before the next one is made, unless it `is_apart`: other work
        may be launched on the lane between its pieces. A lane takes one such step at a time.
        """
        ...


class GraphUsage(NamedTuple):
    """What captured steps take on the device."""

    num_graphs: int
    num_bytes: Bytes
    """With what was taken for graphs that are gone: the driver keeps it for others."""
