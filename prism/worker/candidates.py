"""Whose turn it may be on a lane: what its models offer to `turns.py`.

A choice is made at every step, and mostly two models have changed since the last one: that which was chosen
then, and that whose step has run. So what a model offers is kept until its scheduler tells of a change
(`Scheduler.num_changes`). All else changes with it: tickets come and go with their sequences, their deadlines
and the model's costs move when a step has run, and the time of the last turn when the next one is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prism.engine.sequence import Sequence as Choice
from prism.modes import Rules
from prism.types import LaneId, ModelState
from prism.worker import turns
from prism.worker.cost_book import CostBook
from prism.worker.lanes import Lane
from prism.worker.models import Model
from prism.worker.requests import Requests, Ticket
from prism.worker.snapshot import Runnable, TurnSnapshot

FOR_EVER = float("inf")


class Candidate:
    """One model, and what it offers until it changes."""

    def __init__(self, model: Model, requests: Requests, book: CostBook, *, by_deadline: bool) -> None:
        self.model = model
        self._name = model.name
        self._requests = requests
        self._book = book
        self._by_deadline = by_deadline
        self._seen = -1
        """Changes of its scheduler that are known here."""
        self._has_work = False
        self.has_prompts = False
        """It has some to compute, at the last look."""
        self._begun: list[Choice] = []
        """Prompts that are computed in part."""
        self._offer: Runnable | None = None

    def can_step(self, now: float) -> bool:
        """It could run its lane's next step."""
        model = self.model
        if model.state is not ModelState.ACTIVE or model.early is not None or now < model.stalled_until:
            return False
        self.look()
        return self._has_work

    def look(self) -> None:
        """Forget what has changed."""
        engine = self.model.engine
        assert engine is not None
        scheduler = engine.scheduler
        if scheduler.num_changes != self._seen:
            self._seen = scheduler.num_changes
            self._has_work = scheduler.has_work
            self._begun = scheduler.prompts
            self.has_prompts = bool(self._begun or scheduler.waiting)
            self._offer = None

    def offer(self) -> Runnable:
        """What its next step would be, at the last look."""
        if self._offer is None:
            self._offer = self._make()
        return self._offer

    def _make(self) -> Runnable:
        engine, costs, begun = self.model.engine, self._book.of(self._name), self._begun
        assert engine is not None
        running, waiting = engine.scheduler.running, engine.scheduler.waiting
        num_decodes, context = len(running), sum([s.num_computed for s in running])
        prompts: tuple[int, ...] = ()
        if self.has_prompts:
            num_decodes, context = num_decodes - len(begun), context - sum([s.num_computed for s in begun])
            prompts = tuple([s.num_missing for s in (*begun, *waiting)])
        decode_due, prompt_due, tpot = _dues(self._requests.running_of(self._name), engine.num_queued)
        due = min(decode_due, prompt_due)
        if prompts and prompt_due == FOR_EVER:
            prompt_due = due  # of streams that have lost their place
        seconds = 0.0 if costs is None or not num_decodes else costs.steps.decode(num_decodes, context)
        by_deadline = self._by_deadline
        return Runnable(
            model=self._name,
            deadline=due if by_deadline else 0.0,  # else all are due, and take turns
            last_turn=self.model.last_turn,
            num_decodes=num_decodes,
            decode_deadline=decode_due if by_deadline else FOR_EVER,
            decode_seconds=seconds,
            prompt_tokens=sum(prompts),
            prompts=prompts if by_deadline else (),
            prompt_start=begun[0].num_computed if begun else 0,
            costs=None if costs is None else costs.steps,
            prompt_deadline=prompt_due,
            tpot=tpot if by_deadline else FOR_EVER,
        )

    def check(self) -> None:
        """What is kept is what a fresh look tells."""
        if self.model.engine is None:
            return
        fresh = Candidate(self.model, self._requests, self._book, by_deadline=self._by_deadline)
        for each in (self, fresh):
            each.look()
        assert self.offer() == fresh.offer(), self._name
        assert (self._has_work, self._begun) == (fresh._has_work, fresh._begun), self._name


def _dues(tickets: Iterable[Ticket], num_queued: int) -> tuple[float, float, float]:
    """Of running requests, infinite where there are none; a queued step counts as one token more for all.

    When the next token of those that have had one is due, when the first one of the others is, and the least
    objective of the former.
    """
    decode_due = prompt_due = least = FOR_EVER
    for ticket in tickets:
        tpot = ticket.tpot
        due = ticket.due + num_queued * tpot
        if ticket.last_token is None:
            prompt_due = min(prompt_due, due)
            continue
        if due < decode_due:
            decode_due = due
        if tpot < least:
            least = tpot
    return decode_due, prompt_due, least


class Candidates:
    """All models of a device, by lane."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        models: Mapping[str, Model],
        requests: Requests,
        book: CostBook,
        rules: Rules,
        max_batch_tokens: int,
    ) -> None:
        self._lanes = lanes
        self._all = [Candidate(m, requests, book, by_deadline=rules.by_deadline) for m in models.values()]
        self._of_lane: dict[LaneId, list[Candidate]] = {lane.lane_id: [] for lane in lanes}
        self._max_batch_tokens = max_batch_tokens

    def turn(self, lane: Lane, now: float) -> turns.Turn | None:
        """What the policy chooses; a model that only decodes, and is alone, is no choice."""
        able = [each for each in self.of(lane) if each.can_step(now)]
        if not able:
            return None
        if len(able) == 1 and not able[0].has_prompts:
            return turns.Turn(able[0].model.name, self._max_batch_tokens)
        return turns.decide(self.snapshot(lane, able), now)

    def snapshot(self, lane: Lane, able: Sequence[Candidate]) -> TurnSnapshot:
        """What could run a lane's next step, and those of other lanes that its prompts would hold up."""
        neighbours: list[Runnable] = []
        if any([each.has_prompts for each in able]):  # noqa: C419  (quicker for so few)
            neighbours = [each.offer() for each in self._decoding_beside(lane) if each.model.early is None]
        offers = tuple([each.offer() for each in able])
        return TurnSnapshot(offers, self._max_batch_tokens, tuple(neighbours))

    def neighbours_decode(self, lane: Lane) -> bool:
        """Whether any model of another lane has sequences that draw tokens."""
        return any(True for _ in self._decoding_beside(lane))

    def _decoding_beside(self, lane: Lane) -> Iterator[Candidate]:
        for other in self._lanes:
            if other is not lane:
                for each in self.of(other):
                    if decodes(each.model):
                        each.look()
                        yield each

    def of(self, lane: Lane) -> Sequence[Candidate]:
        """A lane's, in the order of the configuration. Models are bound to theirs for good."""
        own = self._of_lane[lane.lane_id]
        if len(own) != lane.num_models:
            own[:] = [each for each in self._all if each.model.lane is lane]
        return own

    def check(self) -> None:
        """See `Candidate.check`."""
        for each in self._all:
            each.check()
        for lane in self._lanes:
            assert list(self.of(lane)) == [each for each in self._all if each.model.lane is lane]


def decodes(model: Model) -> bool:
    """It has sequences that draw tokens."""
    if not model.is_active or model.engine is None:
        return False
    return any(sequence.is_prompt_computed for sequence in model.engine.scheduler.running)
