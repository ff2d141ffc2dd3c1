"""Which models take turns on which lane of a device, and whose turn it is by `worker/turns.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prism.modes import Rules
from prism.sim.model import SimModel, able_to_step
from prism.sim.modes import Limits
from prism.sim.overlap import Longer, Overlap, Pulls
from prism.sim.ticks import to_seconds
from prism.sim.views import runnable
from prism.types import ModelState
from prism.worker import turns
from prism.worker.snapshot import Runnable, TurnSnapshot


class Choice(NamedTuple):
    """A step of a model with so many tokens at most."""

    model: SimModel
    budget: int


class Lanes:
    """Of one device."""

    def __init__(self, rules: Rules, limits: Limits, together: Callable[[int], float]) -> None:
        self._models: list[list[SimModel]] = [[] for _ in range(limits.num_lanes)]
        self._rules = rules
        self._limits = limits
        self._overlap = Overlap(together)
        self.num_decisions = 0

    def bind(self, model: SimModel) -> None:
        """To the lane with the fewest models, when it is first loaded, for good."""
        if model.lane is None:
            model.lane = min(range(len(self._models)), key=lambda lane: (len(self._models[lane]), lane))
            self._models[model.lane].append(model)

    def able(self, lane: int) -> list[SimModel]:
        """Models that could take a turn."""
        return able_to_step(self._models[lane])

    # --- what decodes side by side ----------------------------------------------------------------------

    def pulls(self) -> list[float]:
        """Of each lane; 0 where nothing decodes."""
        return [self._overlap.pull(models) for models in self._models]

    def others(self, lane: int) -> Pulls:
        """Pulls of the lanes beside this one that decode."""
        pull = self._overlap.pull
        pulls = [pull(models) for other, models in enumerate(self._models) if other != lane]
        return tuple([each for each in pulls if each])

    def beside(self, others: Pulls) -> Longer:
        """How many times its time alone a model's decode step takes beside others."""
        return self._overlap.beside(others)

    def decoding(self, lane: int) -> list[SimModel]:
        """Its models that decode, or would if they had memory."""
        return [m for m in self._models[lane] if m.decodes.size and m.state is ModelState.ACTIVE]

    def are_others_decoding(self, lane: int) -> bool:
        """Models of other lanes do."""
        return any(self.decoding(other) for other in range(len(self._models)) if other != lane)

    # --- whose turn it is -------------------------------------------------------------------------------

    def turn(self, lane: int, members: Sequence[SimModel], now: int) -> Choice:
        """Whom the policy chooses; a model that only decodes, and is alone, is no choice."""
        has_prompts = have_prompts(members)
        if len(members) == 1 and not has_prompts:
            return Choice(members[0], self._limits.max_batch_tokens)
        longer = self.beside(self.others(lane))
        snapshot = TurnSnapshot(
            tuple([runnable(model, self._rules, longer) for model in members]),
            self._limits.max_batch_tokens,
            self._neighbours(lane) if has_prompts else (),
        )
        self.num_decisions += 1
        turn = turns.decide(snapshot, to_seconds(now))
        assert turn is not None
        return Choice(next(model for model in members if model.name == turn.model), turn.budget)

    def _neighbours(self, lane: int) -> tuple[Runnable, ...]:
        found = []
        for other in range(len(self._models)):
            if other != lane and (decoding := self.decoding(other)):
                longer = self.beside(self.others(other))
                found += [runnable(model, self._rules, longer) for model in decoding]
        return tuple(found)


def have_prompts(models: Sequence[SimModel]) -> bool:
    """Any of them has prompts to compute; asked for at each event."""
    return any([model.prompts or model.waiting for model in models])  # noqa: C419  (quicker for so few)
