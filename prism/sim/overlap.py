"""How decode steps of several lanes slow each other down.

Steps of two lanes are queues of kernels that a GPU serves in turns. While one of another lane runs, a step
stands still; so beside a lane whose kernels take `b` a step whose own take `a` needs `c * (a + b) / a` of its
time alone. Small models suffer beside large ones, not the other way round. `c` is what the profile's overlap
of equal models says. One H100, two lanes, batches of 4 and 16: a 1B beside an 8B takes 2.6 and 2.7 times as
long, by the formula 2.6; the 8B 1.27, by the formula 1.23 (`benchmarks/engine`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prism.sim.model import SimModel

VECTOR_PULL = 3.0
"""Kernels of steps of one row, beside those of larger ones, get so many times their time: they have many more
blocks, which find room first. On the same H100 a 1B at batch 16 takes 4.9 times as long beside an 8B at batch
1, by the formula 4.9; a 1B at batch 1 beside an 8B at batch 16 takes 1.8, by the formula 1.8."""

Pulls = tuple[float, ...]
"""Mean times of a kernel on the other lanes that decode, in seconds a layer."""
Longer = Callable[[SimModel], float]
"""How many times its time alone a model's decode step takes."""


class Overlap:
    """Of one device."""

    def __init__(self, together: Callable[[int], float]) -> None:
        """`together` says how much more so many lanes of equal models do than one."""
        self._together = together

    def pull(self, models: Iterable[SimModel]) -> float:
        """Of a lane whose models take turns: a mean over its time."""
        total = seconds = 0.0
        for model in models:
            if model.is_active and model.decodes.size:
                step = model.served.costs.steps.gemm(model.decodes.size)
                total += step * _kernel(model)
                seconds += step
        return total / seconds if seconds else 0.0

    def beside(self, others: Pulls) -> Longer:
        """How many times its time alone a model's decode step takes beside others."""
        if not others:
            return alone
        width = len(others) + 1
        overlap = (1 + (width / self._together(width) - 1) / len(others)) / 2

        def longer(model: SimModel) -> float:
            own = _kernel(model)
            return 1 + sum(max(0.0, overlap * (1 + other / own) - 1) for other in others)

        return longer


def alone(model: SimModel) -> float:
    """Nothing decodes beside it."""
    return 1.0


def _kernel(model: SimModel) -> float:
    """Its weight among others: seconds a layer, while it decodes."""
    batch = model.decodes.size
    seconds = model.served.costs.steps.gemm(batch) / model.served.costs.shape.num_layers
    return seconds * VECTOR_PULL if batch == 1 else seconds


def pulls_of_others(pulls: Sequence[float], lane: int) -> Pulls:
    """Those of the other lanes that decode."""
    return tuple(pull for other, pull in enumerate(pulls) if other != lane and pull)
