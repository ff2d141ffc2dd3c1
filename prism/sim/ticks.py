"""Virtual time: whole picoseconds, so that many steps at once end exactly when one after the other would."""

from __future__ import annotations

from prism.costs import StepCosts

PER_SECOND = 10**12
NEVER = 1 << 80
"""Later than everything."""


def to_ticks(seconds: float) -> int:
    """The nearest tick."""
    return round(seconds * PER_SECOND)


def to_seconds(ticks: int) -> float:
    """What policies and reports see."""
    return ticks / PER_SECOND


def first_at(seconds: float) -> int:
    """The first tick that is no earlier to policies: the nearest one may be, by a rounding."""
    tick = to_ticks(seconds)
    while to_seconds(tick) < seconds:
        tick += 1
    return tick


def first_after(start: int, seconds: float) -> int:
    """The first tick at which policies find that so many seconds have passed since `start`."""
    tick = start + to_ticks(seconds)
    while to_seconds(tick) - to_seconds(start) < seconds:
        tick += 1
    return tick


class StepTicks:
    """Times of a model's decode steps, rounded for each size of batch and for a token of context."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._gemm: dict[int, float] = {}
        self._slope = to_ticks(costs.per_context)

    def gemm(self, batch: int) -> float:
        """See `StepCosts.gemm`: asked for at each choice, so looked up."""
        gemm = self._gemm.get(batch)
        if gemm is None:
            gemm = self._gemm[batch] = self._costs.gemm(batch)
        return gemm

    def seconds(self, batch: int, context: int) -> float:
        """See `StepCosts.decode`."""
        return self.gemm(batch) + self._costs.per_context * context

    def decode(self, batch: int, context: int, longer: float) -> tuple[int, int]:
        """Ticks of a step, and by how much the next one is longer: each sequence has a token more by then.

        It takes `longer` times its time alone because other lanes decode meanwhile.
        """
        gemm, slope = self.gemm(batch), self._slope
        if longer != 1.0:
            slope = to_ticks(self._costs.per_context * longer)
        return to_ticks(gemm * longer) + slope * context, slope * batch
