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
from typing import NamedTuple

from prism.modes import Rules
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.overlap import Longer
from prism.sim.rounds import Part, Rounds
from prism.sim.runs import due_after, steps_alone, steps_until_change
from prism.worker import turns
from prism.worker.foresight import BANKED
from prism.worker.snapshot import Streams, streams_of

MOST_STEPS = 256
"""That are looked at one by one: more of them would be too many when the run is cut soon."""


class Chosen(NamedTuple):
    """A model's decode step, and when it is chosen."""

    model: SimModel
    time: int
    is_single: bool = False
    """The policy has to be asked for the next one: there are prompts, or not all streams are kept in time."""


class Jumps:
    """Of one device."""

    def __init__(self, rules: Rules, limits: Limits, memory: Memory) -> None:
        self._rules = rules
        self._limits = limits
        self._memory = memory

    def next_to_decode(self, members: Sequence[SimModel], longer: Longer, now: int) -> SimModel | None:
        """Whom the policy chooses of a lane's models, which only decode; None where it has to be asked."""
        if self._limits.is_stepping or self.gives_up(members, longer):
            return None
        if len(members) == 1:
            return members[0]
        if not self._rules.by_deadline:
            return min(members, key=lambda model: (model.last_turn, model.name))
        return min(members, key=lambda model: (max(model.due, now), model.last_turn, model.name))

    def gives_up(self, members: Sequence[SimModel], longer: Longer) -> bool:
        """Whether the policy gives up streams of a lane."""
        return len(members) > 1 and gives_up(members, self._rules, longer)

    def steps_from(
        self, chosen: Chosen, start: int, members: Sequence[SimModel], longer: Longer
    ) -> Rounds[SimModel]:
        """The chosen step, which begins at `start`, and those that the policy would choose behind it as long
        as nothing happens."""
        if len(members) == 1:
            return self._alone(chosen, start, longer)
        if not chosen.is_single:
            order = order_of_rounds(chosen.model, members)
            if len(order) > 1:
                rounds = self._steps(order, chosen, start, members, longer)
                if rounds.num_steps >= 2 * len(order):  # else they do not take turns
                    return rounds
        return self._steps([chosen.model], chosen, start, members, longer)

    def _alone(self, chosen: Chosen, start: int, longer: Longer) -> Rounds[SimModel]:
        """Most runs are of a model that has its lane to itself."""
        model, limits = chosen.model, self._limits
        steps = 1 if limits.is_stepping or chosen.is_single else steps_alone(model, self._memory)
        part = Part(model, *model.decode_ticks(longer(model)))
        return Rounds([part], start, steps, chosen.time, is_ahead=limits.is_queueing)

    def _steps(
        self,
        order: list[SimModel],
        chosen: Chosen,
        start: int,
        members: Sequence[SimModel],
        longer: Longer,
    ) -> Rounds[SimModel]:
        """As many steps in this order as the policy would choose."""
        limits = self._limits
        parts = [Part(m, *m.decode_ticks(longer(m))) for m in order]
        steps = 1 if limits.is_stepping or chosen.is_single else self._steps_until_change(order)
        if steps > 1:
            steps = steps_with_time(steps, members, len(order), self._rules, longer)
        rounds = Rounds(parts, start, steps, chosen.time, is_ahead=limits.is_queueing)
        if steps > 1:
            rounds.shorten(steps_in_turn(rounds, members, self._rules))
        return rounds

    def _steps_until_change(self, order: Sequence[SimModel]) -> int:
        return steps_until_change(order) if len(order) > 1 else steps_alone(order[0], self._memory)


def order_of_rounds(first: SimModel, members: Sequence[SimModel]) -> list[SimModel]:
    """The order in which all members take turns, if they do, and `first` is to begin; else `first` alone."""
    order = sorted(members, key=lambda model: (model.last_turn, model.name))
    return order if order[0] is first else [first]


def gives_up(members: Sequence[SimModel], rules: Rules, longer: Longer, more: int = 0) -> bool:
    """Whether the policy gives up streams of a lane when each of them has drawn so many tokens more."""
    if not rules.by_deadline or len(members) == 1:
        return False
    return bool(
        turns.beyond_share([_streams(model, longer, more) for model in members if model.decodes.size])
    )


def _streams(model: SimModel, longer: Longer, more: int) -> Streams:
    seconds = longer(model) * model.decode_seconds(more)
    return streams_of(model.name, model.decodes.size, seconds, model.served.slo.tpot)


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
    if len(rounds.parts) == 1:
        return _alone(rounds, members) if rules.by_deadline else 1
    return _in_rounds(rounds) if rules.by_deadline else rounds.num_steps


def _alone(rounds: Rounds[SimModel], members: Sequence[SimModel]) -> int:
    """Its deadlines and the times of decision only grow, so the first that is too late is searched for, from
    where it would be if what the streams are ahead by after a step stayed the same."""
    model = rounds.parts[0].who
    due = min([other.due for other in members if other is not model])
    due_at = due_after(model, rounds)
    low, high, stride = 1, rounds.num_steps, 1
    place = rounds.ended_by(due - due_at(1) + rounds.end_of(1))
    while low < high:
        if not low <= place < high:
            place = (low + high) // 2
        if rounds.decided_at(place) < due and due_at(place) < due:
            low = place + 1
            place += stride
        else:
            high = place
            place -= stride
        stride *= 2
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
