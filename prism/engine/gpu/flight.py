"""A step on its way through a lane's stream."""

from __future__ import annotations

import torch
from torch import Tensor

from prism.engine.pieces import Pieces, Work
from prism.engine.sampler import Sampled
from prism.engine.sequence import Sequence
from prism.engine.step import Step


class Event:
    """Work queued on the current stream until now."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.event.record()

    def is_done(self) -> bool:
        """It has run."""
        done: bool = self.event.query()  # type: ignore[no-untyped-call]
        return done


class GpuFlight:
    """See `InFlight`. Its tokens lie in pinned memory once its event has come."""

    def __init__(
        self,
        step: Step,
        sampled: tuple[Sequence, ...],
        tokens: Tensor,
        stream: torch.cuda.Stream,
        work: Work,
    ) -> None:
        """`tokens` is pinned and has one place for each of `sampled`."""
        self.step = step
        self.sampled = sampled
        self.end: Event | None = None
        """Recorded when all of it has been launched: before, there is nothing that could be waited for."""
        self._tokens = tokens
        self._stream = stream
        self._pieces = Pieces(work)

    @property
    def is_begun(self) -> bool:
        """See `InFlight.is_begun`."""
        return self._pieces.is_begun

    @property
    def is_launched(self) -> bool:
        """See `InFlight.is_launched`."""
        return self.end is not None

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            has_advanced = self._pieces.advance(num_groups, seconds)
            if self._pieces.is_complete and self.end is None:
                self.end = Event()
        return has_advanced

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        return self.end is not None and self.end.is_done()

    def draws(self) -> Sampled:
        """See `InFlight.draws`."""
        assert self.end is not None
        self.end.event.synchronize()
        if self._pieces.drawn is not None:
            return self._pieces.drawn
        return Sampled(self._tokens.tolist(), {})
