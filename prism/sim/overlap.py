"""How decode steps of several lanes slow each other down.

Steps of two lanes are queues of kernels that a GPU serves in turns: while one of another lane runs, a step
stands still, but for what the shorter of the two kernels has beside the longer. Where kernels take `a` and
`b`, both have had one after `max(a, b) + o * min(a, b)`; beside a lane of `b` a step needs that over `a` of
its time alone. So small models suffer beside large ones, and large ones little. `o` is what the profile's
overlap of equal models says. 15 pairs of a 1B and an 8B on two lanes of an H100, 7 of them in a server: off
by 7 % (root mean square; `tests/sim/test_overlap.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prism.sim.model import SimModel
from prism.types import ModelState

VECTOR_PULL = 2.5
"""Kernels of steps of one row, beside those of larger ones, get so many times their time: they have many more
blocks, which find room first. A 1B at batch 4 takes 2.2 times as long beside another one at batch 1, and that
one 1.3 times as long."""

Pulls = tuple[float, ...]
"""Mean times of a kernel on the other lanes that decode, in seconds a layer."""
Longer = Callable[[SimModel], float]
"""How many times its time alone a model's decode step takes."""


class Overlap:
    """Of one device."""

    def __init__(self, together: Callable[[int], float]) -> None:
        """`together` says how much more so many lanes of equal models do than one; always the same."""
        self._together = together
        self._hidden: dict[int, float] = {}

    def pull(self, models: Iterable[SimModel]) -> float:
        """Of a lane whose models take turns: a mean over its time. 0 if nothing decodes."""
        total = seconds = 0.0
        for model in models:
            if model.decodes.size and model.state is ModelState.ACTIVE and not model.is_stalled:
                kernel = model.kernel_seconds
                step = kernel * model.num_layers
                total += step * (kernel * VECTOR_PULL if model.decodes.size == 1 else kernel)
                seconds += step
        return total / seconds if seconds else 0.0

    def beside(self, others: Pulls) -> Longer:
        """How many times its time alone a model's decode step takes beside others."""
        if not others:
            return alone
        hidden_not = self._hidden_not(len(others))

        def longer(model: SimModel) -> float:
            own = _kernel(model)
            parts = [
                hidden_not * other / own if other < own else other / own + hidden_not - 1 for other in others
            ]
            return 1 + sum(parts)

        return longer

    def _hidden_not(self, num_others: int) -> float:
        """Of the shorter of two kernels, what it takes beside the longer."""
        found = self._hidden.get(num_others)
        if found is None:
            width = num_others + 1
            found = self._hidden[num_others] = (width / self._together(width) - 1) / num_others
        return found


def alone(model: SimModel) -> float:
    """Nothing decodes beside it."""
    return 1.0


def _kernel(model: SimModel) -> float:
    """Its weight among others: seconds a layer, while it decodes."""
    return model.kernel_seconds * VECTOR_PULL if model.decodes.size == 1 else model.kernel_seconds


def pulls_of_others(pulls: Sequence[float], lane: int) -> Pulls:
    """Those of the other lanes that decode."""
    return tuple([pull for other, pull in enumerate(pulls) if pull and other != lane])
