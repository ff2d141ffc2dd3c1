"""How long the turns of a worker's loop take, and which part of a long one took longest.

Turns are made some ten thousand times a second: a look at the clock behind each part is all that most get.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from prism.stalls import STALL_SECONDS, Stalls

LEAST_SECONDS = 0.02
"""A shorter part is not worth noting: some part of a turn that takes `STALL_SECONDS` is longer."""


class TurnWatch:
    """Looks for turns that are long; the loop should never be away for long."""

    __slots__ = ("_begin", "_clock", "_computes_steps", "_last", "_longest", "_part", "stalls")

    def __init__(
        self, process: str, *, computes_steps: bool, clock: Callable[[], float] = perf_counter
    ) -> None:
        """A loop that itself `computes_steps`, on a CPU, does not stand still meanwhile."""
        self.stalls = Stalls(process)
        self._computes_steps = computes_steps
        self._clock = clock
        self.begin()

    def begin(self) -> None:
        """A turn begins, not where the last one has ended."""
        self._begin = self._last = self._clock()
        self._longest, self._part = LEAST_SECONDS, ""

    def waited(self, at_most: float) -> None:
        """A wait for messages is over, which was to take so many seconds at most; a turn begins."""
        late = self._clock() - self._last - at_most
        self.begin()
        if late > STALL_SECONDS:
            self.stalls.note(late, "it woke so late from a wait", self._last)

    def passed(self, part: str) -> None:
        """A part of the turn is over."""
        now = self._clock()
        spent = now - self._last
        if spent > self._longest:
            self._longest, self._part = spent, part
        self._last = now

    def steps_passed(self) -> None:
        """The part that makes steps and launches them is over."""
        if self._computes_steps:
            now = self._clock()
            self._begin += now - self._last
            self._last = now
        else:
            self.passed("steps")

    def end(self) -> None:
        """The turn is over."""
        self.passed("the rest")
        if self._last - self._begin > STALL_SECONDS:
            cause = f"{self._longest:.2f} s in one part of a turn, {self._part}"
            self.stalls.note(self._last - self._begin, cause, self._last)
        self._begin, self._longest = self._last, LEAST_SECONDS

    def tell(self) -> None:
        """See `Stalls.tell`. It ends the turn, so that the thread's time is looked at behind a long one."""
        self.end()
        self.stalls.tell(self._last)
