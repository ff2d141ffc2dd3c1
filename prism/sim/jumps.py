"""How long the policy of turns would go on as it does, when models of a lane only decode.

Two patterns are recognised. In both, the policy's rule is that the earliest deadline goes first (deadlines
that have passed count as now; of equals who waited longest), and a step moves a model's deadline to its end
plus the model's TPOT objective.

- **Rounds**: each model steps once, always in the same order. The policy itself is asked for two rounds in
  advance. Steps only get longer as contexts grow, so the model whose turn is longest ago only gets more
  urgent compared with the others: what held in the second round holds in all later ones.
- **One model alone**, as long as its own next deadline comes before those of all others, which stand still.

Both hold as long as a lane has time for all its streams: contexts grow, and from some step on streams are
given up. Then the policy is asked for each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prism.modes import Rules
from prism.sim.model import SimModel
from prism.sim.overlap import Longer
from prism.sim.rounds import Rounds
from prism.sim.ticks import to_seconds
from prism.worker import turns
from prism.worker.snapshot import Runnable, TurnSnapshot


class Chosen(NamedTuple):
    """A step: when it is chosen, when it begins, and when the lane has room behind it (see `Rounds`)."""

    time: int
    start: int
    room: int | None

    def next(self, end: int) -> Chosen:
        """The one behind it, if it has run at `end`."""
        return Chosen(end, end, None) if self.room is None else Chosen(self.room, end, end)


def order_of_rounds(
    first: SimModel,
    members: Sequence[SimModel],
    rules: Rules,
    longer: Longer,
    chosen: Chosen,
) -> list[SimModel]:
    """The order in which all members take turns, or `first` alone if they do not.

    A member's step takes `longer` times its time alone.
    """
    if len(members) == 1:
        return [first]
    order = sorted(members, key=lambda model: (model.last_turn, model.name))
    if order[0] is not first:
        return [first]
    ticks = {model: model.decode_ticks(longer(model)) for model in order}
    state = {model: (model.last_end, model.last_turn) for model in order}
    for step in range(2 * len(order)):
        expected = order[step % len(order)]
        seen = tuple(_runnable(model, *state[model], rules) for model in order)
        turn = turns.decide(TurnSnapshot(seen, 1), to_seconds(chosen.time))
        if turn is None or turn.model != expected.name:
            return [first]
        cost, growth = ticks[expected]
        end = chosen.start + cost + growth * (step // len(order))
        state[expected] = (end, chosen.time)
        chosen = chosen.next(end)
    return order


def _runnable(model: SimModel, last_end: int, last_turn: int, rules: Rules) -> Runnable:
    deadline = to_seconds(last_end + model.tpot) if rules.by_deadline else 0.0
    return Runnable(model.name, deadline, to_seconds(last_turn), num_decodes=1)


def gives_up(members: Sequence[SimModel], rules: Rules, longer: Longer, more: int = 0) -> bool:
    """Whether the policy gives up streams of a lane when each of them has drawn so many tokens more."""
    if not rules.by_deadline or len(members) == 1:
        return False
    return bool(turns.given_up(_decoding(model, longer, more) for model in members))


def _decoding(model: SimModel, longer: Longer, more: int) -> Runnable:
    size, served = model.decodes.size, model.served
    seconds = longer(model) * served.costs.steps.decode(size, model.decodes.context + more * size)
    return Runnable(model.name, 0.0, 0.0, size, decode_seconds=seconds, tpot=served.slo.tpot)


def steps_with_time(
    steps: int, members: Sequence[SimModel], num_in_turn: int, rules: Rules, longer: Longer
) -> int:
    """Those of so many steps that are sure to begin before a stream is given up; the first one does."""
    low, high = 0, -(-steps // num_in_turn)  # rounds
    if not gives_up(members, rules, longer, high):
        return steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if gives_up(members, rules, longer, middle) else (middle, high)
    return min(steps, low * num_in_turn + 1)


def may_follow(rounds: Rounds[SimModel], model: SimModel, members: Sequence[SimModel], rules: Rules) -> int:
    """Steps of `model` that follow one another before somebody else's turn comes."""
    if not rules.by_deadline:
        return 1
    due = min(other.last_end + other.tpot for other in members if other is not model)
    return min(rounds.num_steps, rounds.ended_by(due - model.tpot - 1) + 1)
