"""A step on its way through a lane's stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prism.engine.pieces import Pieces, Work
from prism.engine.sampler import Sampled
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.memory.cuda_calls import CudaCalls

if TYPE_CHECKING:  # needs Triton, which only GPUs have
    from prism.engine.gpu.lane import GpuLane


class Event:
    """Work queued on a stream until now."""

    def __init__(self, calls: CudaCalls, stream: torch.cuda.Stream) -> None:
        self._calls = calls
        self._mark = calls.mark()
        self._mark.set(stream.cuda_stream)

    def is_done(self) -> bool:
        """It has run. Raises `DriverError` if it has failed."""
        return self._mark.has_passed()

    def wait(self) -> None:
        """Until it has run. Raises `DriverError` if it has failed."""
        self._mark.wait()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """What is queued on the stream from now on runs behind it."""
        self._calls.wait_for(stream.cuda_stream, self._mark)


class GpuFlight:
    """See `InFlight`. Its tokens lie in pinned memory once its event has come."""

    def __init__(
        self,
        step: Step,
        sampled: tuple[Sequence, ...],
        tokens: Tensor,
        lane: GpuLane,
        work: Work,
        shortcut: Callable[[], bool] | None = None,
    ) -> None:
        """`tokens` is pinned and has one place for each of `sampled`.

        `shortcut` does all of the work at once, in a few calls of the driver, or nothing: it says which.
        """
        self.step = step
        self.sampled = sampled
        self.end: Event | None = None
        """Recorded when all of it has been launched: before, there is nothing that could be waited for."""
        self._tokens = tokens
        self._lane = lane
        self._pieces = Pieces(work)
        self._shortcut = shortcut

    @property
    def is_begun(self) -> bool:
        """See `InFlight.is_begun`."""
        return self._pieces.is_begun or self.is_launched

    @property
    def is_launched(self) -> bool:
        """See `InFlight.is_launched`."""
        return self.end is not None

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`."""
        if self.is_launched:
            return False
        if num_groups is None and self._shortcut is not None and not self.is_begun and self._shortcut():
            self.end = self._lane.event()
            return True
        with torch.inference_mode(), torch.cuda.stream(self._lane.stream):
            has_advanced = self._pieces.advance(num_groups, seconds)
            if self._pieces.is_complete:
                self.end = self._lane.event()
        return has_advanced

    def is_done(self) -> bool:
        """See `InFlight.is_done`."""
        return self.end is not None and self.end.is_done()

    def draws(self) -> Sampled:
        """See `InFlight.draws`."""
        assert self.end is not None
        self.end.wait()
        if self._pieces.drawn is not None:
            return self._pieces.drawn
        return Sampled(self._tokens.tolist(), {})
