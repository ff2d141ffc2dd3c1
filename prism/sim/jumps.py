"""How long the policy of turns would go on as it does, when models of a lane only decode.

The policy's rule is then that the earliest deadline goes first; deadlines that have passed count as now, and
of equals who has waited longest goes first. A step moves a model's deadline on by its TPOT objective, but no
further than `BANKED` objectives behind the step's end. Two patterns are recognised:

- **Rounds**: each model steps once, always in the same order.
- **One model alone**, as long as its own next deadline comes before those of all others, which stand still.

Both hold as long as a lane has time for all its streams: contexts grow, and from some step on streams are
given up. Then the policy is asked for each step.
"""

from __future__ import annotations

from collections.abc import Sequence

from prism.modes import Rules
from prism.sim.model import SimModel
from prism.sim.overlap import Longer
from prism.sim.rounds import Rounds
from prism.sim.runs import due_after
from prism.worker import turns
from prism.worker.foresight import BANKED
from prism.worker.snapshot import decode_share

MOST_STEPS = 256
"""That are looked at one by one: more of them would be too many when the run is cut soon."""


def order_of_rounds(first: SimModel, members: Sequence[SimModel]) -> list[SimModel]:
    """The order in which all members take turns, if they do, and `first` is to begin; else `first` alone."""
    if len(members) == 1:
        return [first]
    order = sorted(members, key=lambda model: (model.last_turn, model.name))
    return order if order[0] is first else [first]


def gives_up(members: Sequence[SimModel], rules: Rules, longer: Longer, more: int = 0) -> bool:
    """Whether the policy gives up streams of a lane when each of them has drawn so many tokens more."""
    if not rules.by_deadline or len(members) == 1:
        return False
    return bool(
        turns.beyond_share([_streams(model, longer, more) for model in members if model.decodes.size])
    )


def _streams(model: SimModel, longer: Longer, more: int) -> turns.Streams:
    share = decode_share(longer(model) * model.decode_seconds(more), model.served.slo.tpot)
    return turns.Streams(share, model.decodes.size, model.name)


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


def steps_in_turn(rounds: Rounds[SimModel], members: Sequence[SimModel], rules: Rules) -> int:
    """Those of the steps that the policy would choose one after the other, as long as nothing happens."""
    if len(members) == 1:
        return rounds.num_steps
    if len(rounds.parts) == 1:
        return _alone(rounds, members) if rules.by_deadline else 1
    return _in_rounds(rounds) if rules.by_deadline else rounds.num_steps


def _alone(rounds: Rounds[SimModel], members: Sequence[SimModel]) -> int:
    """Its deadlines and the times of decision only grow, so the first that is too late is searched for."""
    model = rounds.parts[0].who
    due = min(other.due for other in members if other is not model)
    due_at = due_after(model, rounds)
    low, high = 1, rounds.num_steps
    while low < high:
        middle = (low + high) // 2
        follows = max(rounds.decided_at(middle), due_at(middle)) < due
        low, high = (middle + 1, high) if follows else (low, middle)
    return low


def _in_rounds(rounds: Rounds[SimModel]) -> int:
    parts, end = rounds.parts, rounds.start
    models = [part.who for part in parts]
    dues, turns_of = [model.due for model in models], [model.last_turn for model in models]
    num_steps = min(rounds.num_steps, MOST_STEPS)
    for step in range(num_steps):
        time = rounds.decided_at(step)
        number, index = divmod(step, len(parts))
        keys = [(max(dues[i], time), turns_of[i], model.name) for i, model in enumerate(models)]
        if step and min(keys) != keys[index]:
            return step
        turns_of[index] = end
        end += parts[index].first + number * parts[index].growth
        tpot = models[index].tpot
        dues[index] = min(dues[index] + tpot, end + BANKED * tpot)
    return num_steps
