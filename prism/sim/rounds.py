"""Work on a lane: one step with prompts, or many rounds of decode steps whose end is known in advance.

A round is one step of each member, in order. A member's step reads its context, which grows by one token a
sequence and step, so the j-th round takes `first + j * growth` and the end of all is a quadratic in their
number. A single step is one round of one member.

Who steps next is chosen when the lane has room for one more step. Where steps are queued ahead that is `LEAD`
before the present one ends, so a step *closes*, for those who decide, that much early: everything is known of
it by then but that it has run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Generic, TypeVar

from prism.sim.ticks import NEVER, to_ticks
from prism.sim.usage import Gaps, Series

LEAD = to_ticks(0.0015)
"""As `LEAD_SECONDS` of the worker's stepper."""

M = TypeVar("M")


@dataclass(slots=True)
class Part(Generic[M]):
    """A member of each round."""

    who: M
    first: int
    """Ticks of its first step."""
    growth: int
    """Ticks by which each step takes longer than the one before."""


class Rounds(Generic[M]):
    """`num_steps` steps from `start` on, in rounds of `parts`."""

    def __init__(
        self,
        parts: list[Part[M]],
        start: int,
        num_steps: int,
        decided: int | None = None,
        *,
        is_ahead: bool = False,
    ) -> None:
        """`decided` is when the first step was chosen; `is_ahead` if steps are chosen before the one in front
        of them has ended."""
        self.parts = parts
        self.start = start
        self.num_steps = num_steps
        self.decided = start if decided is None else decided
        self._is_ahead = is_ahead
        self._size = len(parts)
        self.done = 0
        """Steps that have been accounted for."""
        self.begun = 1
        """Steps that have got their blocks; the first one has them when this is made."""
        self.stands_until = 0
        """Before then `done` and `begun` are up to date, however often they are looked at: a cut takes only
        steps that would have begun later."""
        part = parts[0]
        self._first = part.first if self._size == 1 else sum([part.first for part in parts])
        self.growth = part.growth if self._size == 1 else sum([part.growth for part in parts])
        """Ticks by which each round takes longer than the one before."""
        self.end = self.end_of(num_steps)
        self.closes = self.closed_at(num_steps)
        """When what follows the last step is chosen."""

    def end_of(self, steps: int) -> int:
        """When the first `steps` steps have run."""
        if self._size == 1:
            return self.start + steps * self._first + self.growth * (steps * (steps - 1) // 2)
        rounds, rest = divmod(steps, self._size)
        end = self.start + rounds * self._first + self.growth * (rounds * (rounds - 1) // 2)
        for part in self.parts[:rest]:
            end += part.first + rounds * part.growth
        return end

    def ended_by(self, now: int) -> int:
        """Steps that have run then."""
        if now >= self.end:
            return self.num_steps
        if now <= self.start:
            return 0
        rounds = self._rounds_within(now - self.start)
        if self._size == 1:
            return rounds
        steps = min(rounds * self._size, self.num_steps)
        while steps < self.num_steps and self.end_of(steps + 1) <= now:
            steps += 1
        return steps

    def closed_at(self, steps: int) -> int:
        """When the first `steps` steps, one at least, count as run to who chooses the next one."""
        if self._size == 1:
            before = steps - 1
            length = self._first + before * self.growth
            end = self.start + steps * self._first + self.growth * (steps * before // 2)
            return end if not self._is_ahead else end - length if length < LEAD else end - LEAD
        end = self.end_of(steps)
        if not self._is_ahead:
            return end
        number, place = divmod(steps - 1, self._size)
        part = self.parts[place]
        length = part.first + number * part.growth
        return end - (length if length < LEAD else LEAD)

    def decided_at(self, index: int) -> int:
        """When a step was chosen."""
        return self.closed_at(index) if index else self.decided

    def progress(self, now: int) -> tuple[int, int]:
        """Steps that count as run then, and those that were chosen before then or count as run."""
        if now >= self.end:
            return self.num_steps, self.num_steps
        closed = self.ended_by(now)
        close = self.closed_at(closed + 1)
        if close > now:
            return closed, closed + (self.decided_at(closed) < now)
        closed += 1
        return closed, closed + (closed < self.num_steps and close < now)

    def account(self, closed: int, begun: int) -> None:
        """So many steps are done and begun now."""
        self.done, self.begun = closed, begun
        if begun > closed:
            self.stands_until = self.closed_at(begun)
        else:
            self.stands_until = NEVER if closed == self.num_steps else self.decided_at(closed) + 1

    @property
    def is_closing(self) -> bool:
        """A step of several has closed just now, by the last account: no other has been chosen behind it."""
        return self.begun == self.done

    def cut(self, now: int, at_least: int = 0) -> None:
        """Nothing is chosen from `now` on; what has been is run, and so are the first `at_least` steps.

        It has been accounted for until now.
        """
        begun = self.begun if self.done else int(self.decided < now)
        self.shorten(max(begun, at_least))

    def shorten(self, steps: int) -> None:
        """At most so many are run."""
        if steps < self.num_steps:
            self.num_steps = steps
            self.end = self.end_of(steps)
            self.closes = self.closed_at(steps) if steps else self.decided

    def steps_of(self, index: int, steps: int) -> int:
        """How many of the first `steps` are the member's."""
        size = self._size
        return steps if size == 1 else steps // size + (index < steps % size)

    def last_of(self, index: int, steps: int) -> int:
        """Number of the member's last step among the first `steps`; it has one."""
        return (self.steps_of(index, steps) - 1) * self._size + index

    def end_of_member(self, index: int, count: int) -> int:
        """When the member's first `count` steps have run; one at least."""
        return self.end_of((count - 1) * self._size + index + 1)

    def gaps_of(self, index: int, before: int, count: int, last_end: int) -> Gaps:
        """What lies between the ends of the member's own steps, `count` of them behind its first `before`,
        and `last_end` in front of them."""
        if self._size == 1:
            first = self._first + before * self.growth
            end = self.start + (before + 1) * self._first + self.growth * ((before + 1) * before // 2)
            return Gaps(
                end - last_end, Series(first + self.growth if count > 1 else 0, self.growth, count - 1)
            )
        end = self.end_of_member(index, before + 1)
        gap = self.end_of_member(index, before + 2) - end if count > 1 else 0
        return Gaps(end - last_end, Series(gap, self.growth, count - 1))

    def series_of(self, index: int, before: int, count: int) -> Series:
        """How long `count` of the member's own steps take, those behind its first `before`."""
        part = self.parts[index]
        return Series(part.first + before * part.growth, part.growth, count)

    def _rounds_within(self, ticks: int) -> int:
        """Most whole rounds that take no longer: `first * n + growth * n * (n - 1) / 2 <= ticks`."""
        growth, linear = self.growth, 2 * self._first - self.growth
        if growth == 0:
            return ticks // self._first
        return (isqrt(linear * linear + 8 * growth * ticks) - linear) // (2 * growth)
