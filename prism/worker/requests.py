"""The requests that a worker holds, from `Submit` to their one end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from prism.engine.sequence import Sequence
from prism.messages import ResumedChoice, Submit
from prism.types import GatewayId, ModelId, Rank, RequestId
from prism.worker.earliest import Earliest
from prism.worker.foresight import BANKED
from prism.worker.snapshot import WaitingRequest


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in this worker. `waiting -> running -> ended`; an eviction makes it wait again."""

    submit: Submit
    gateway: GatewayId
    expires: float
    is_running: bool = False
    is_started: bool = False
    """`Started` has been sent in this attempt."""
    is_hopeful: bool = False
    """It came while its model was in memory, and could well have had its first token in time."""
    last_token: float | None = None
    due: float = field(init=False)
    """When its next token is due."""
    attempt: int = field(init=False)
    tpot: float = field(init=False)
    """Objective between two tokens of a choice."""
    queue_position: int = 0
    estimated_seconds: float = 0.0
    """What it was told when it came."""
    waiting: WaitingRequest | None = None
    """What admission sees of it, as long as that holds."""
    resumed: dict[int, ResumedChoice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slo = self.submit.slo
        self.due, self.tpot = self.submit.arrival + slo.ttft, slo.tpot
        self.attempt = self.submit.attempt

    @property
    def request_id(self) -> RequestId:
        """Its identity."""
        return RequestId(self.submit.request_id)

    @property
    def model(self) -> ModelId:
        """The model that it asks for."""
        return ModelId(self.submit.model)

    @property
    def open_choices(self) -> list[int]:
        """Choices that have not finished."""
        resumed = self.resumed
        return [c for c in range(self.submit.params.n) if c not in resumed or not resumed[c].finished]

    @property
    def num_resumed(self) -> int:
        """Output tokens that its longest choice has from earlier attempts and places."""
        return max((len(choice.token_ids) for choice in self.resumed.values()), default=0)

    def found_late(self, now: float) -> None:
        """Its first token cannot come in time any more: it is given the objective once more from now on.

        Else its deadline, which has passed, would go before all that can still be met.
        """
        if self.last_token is None:
            self.due = now + self.submit.slo.ttft

    def is_late(self, now: float) -> bool:
        """It has no token yet, and there is none to blame but the others on the device."""
        in_vain = self.last_token is None and now > self.submit.arrival + self.submit.slo.ttft
        return in_vain and self.is_hopeful

    def clip(self, max_tokens: int) -> None:
        """Lower a default max_tokens to what memory can hold."""
        params = msgspec.structs.replace(self.submit.params, max_tokens=max_tokens)
        self.submit = msgspec.structs.replace(self.submit, params=params)
        self.waiting = None

    def finish_choice(self, choice: int) -> None:
        """The choice has ended and is never run again."""
        self.waiting = None
        self.resumed[choice] = ResumedChoice(choice=choice, token_ids=[], finished=True)


def got_tokens(tickets: Iterable[Ticket], now: float) -> None:
    """A step has drawn tokens for these, one for each of their choices at most.

    Tokens are due one TPOT objective apart from the first one on, so that what came early may be made use
    of; but no more than `BANKED` of it, lest a stream that was quick stands still.
    """
    for ticket in tickets:
        last, tpot = ticket.last_token, ticket.tpot
        if last is None:
            ticket.due = now + tpot
        elif now > last:
            due, latest = ticket.due + tpot, now + BANKED * tpot
            ticket.due = due if due < latest else latest
        ticket.last_token = now


class Requests:
    """All tickets, by request and by model. Some of what is asked each round has an index of its own."""

    def __init__(self) -> None:
        self._tickets: dict[RequestId, Ticket] = {}
        self._by_model: defaultdict[ModelId, dict[RequestId, Ticket]] = defaultdict(dict)
        self._running: defaultdict[ModelId, dict[RequestId, Ticket]] = defaultdict(dict)
        self._waiting: dict[RequestId, Ticket] = {}
        self._num_waiting: Counter[ModelId] = Counter()
        self._expiries: Earliest[tuple[float, RequestId]] = Earliest()
        self._oldest: defaultdict[ModelId, Earliest[Rank]] = defaultdict(Earliest)
        self._latest_ends: Earliest[tuple[float, RequestId]] = Earliest()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(tuple(self._tickets.values()))

    def get(self, request_id: RequestId) -> Ticket | None:
        """The ticket, if it has not ended."""
        return self._tickets.get(request_id)

    def of_sequences(self, sequences: Iterable[Sequence]) -> list[Ticket]:
        """Theirs, in their order; none has ended."""
        tickets = self._tickets
        return [tickets[sequence.request_id] for sequence in sequences]

    # --- coming and going -----------------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """A new request, outside of any engine."""
        assert ticket.request_id not in self._tickets
        self._tickets[ticket.request_id] = ticket
        self._wait(ticket)
        self._by_model[ticket.model][ticket.request_id] = ticket
        self._oldest[ticket.model].add(_rank(ticket))
        self._latest_ends.add((ticket.submit.latest_end, ticket.request_id))

    def remove(self, ticket: Ticket) -> None:
        """The request has ended."""
        del self._tickets[ticket.request_id]
        if ticket.is_running:
            del self._running[ticket.model][ticket.request_id]
        else:
            self._wait_no_more(ticket)
        del self._by_model[ticket.model][ticket.request_id]
        self._oldest[ticket.model].remove(_rank(ticket))
        self._latest_ends.remove((ticket.submit.latest_end, ticket.request_id))

    def enter(self, ticket: Ticket) -> None:
        """Its model's engine takes it in."""
        ticket.is_running = True
        self._running[ticket.model][ticket.request_id] = ticket
        self._wait_no_more(ticket)

    def leave(self, ticket: Ticket) -> None:
        """It has lost its place in the engine, and waits again."""
        ticket.is_running = False
        del self._running[ticket.model][ticket.request_id]
        ticket.waiting = None
        self._wait(ticket)

    def _wait(self, ticket: Ticket) -> None:
        self._waiting[ticket.request_id] = ticket
        self._num_waiting[ticket.model] += 1
        if not ticket.is_started:
            self._expiries.add((ticket.expires, ticket.request_id))

    def _wait_no_more(self, ticket: Ticket) -> None:
        del self._waiting[ticket.request_id]
        self._num_waiting[ticket.model] -= 1
        if not ticket.is_started:
            self._expiries.remove((ticket.expires, ticket.request_id))

    # --- who there is ---------------------------------------------------------------------------------

    def of_model(self, model: ModelId) -> tuple[Ticket, ...]:
        """A model's tickets in order of arrival here."""
        return tuple(self._by_model[model].values())

    def running_of(self, model: ModelId) -> Collection[Ticket]:
        """Those that its engine has taken in; asked at each step, when thousands may wait."""
        return self._running[model].values()

    def has_any(self, model: ModelId) -> bool:
        """Somebody asks for a model."""
        return bool(self._by_model[model])

    def oldest(self, model: ModelId) -> Rank | None:
        """Of a model's requests."""
        return self._oldest[model].least

    def overdue(self, now: float) -> Ticket | None:
        """One that has taken too long altogether."""
        least = self._latest_ends.least
        return None if least is None or least[0] > now else self._tickets[least[1]]

    @property
    def latest_end(self) -> float:
        """When the next one has taken too long."""
        least = self._latest_ends.least
        return float("inf") if least is None else least[0]

    @property
    def next_expiry(self) -> float:
        """When the next one that has not started has waited for as long as it may."""
        least = self._expiries.least
        return float("inf") if least is None else least[0]

    def of_gateway(self, gateway: GatewayId) -> tuple[Ticket, ...]:
        """What one gateway has sent."""
        return tuple(t for t in self._tickets.values() if t.gateway == gateway)

    # --- outside of engines ---------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[Ticket, ...]:
        """Requests outside of any engine."""
        return tuple(self._waiting.values())

    @property
    def num_waiting(self) -> int:
        """How many these are."""
        return len(self._waiting)

    def has_waiting(self, model: ModelId) -> bool:
        """One of a model's is among them; asked at each step."""
        return self._num_waiting[model] > 0

    def check(self) -> None:
        """Each index tells what looking at every request would."""
        tickets = self._tickets
        assert self._waiting.keys() == {ticket.request_id for ticket in self if not ticket.is_running}
        assert +self._num_waiting == Counter(ticket.model for ticket in self._waiting.values())
        assert sum(map(len, self._by_model.values())) == len(tickets)
        for model, own in self._by_model.items():
            assert all(ticket.model == model and tickets[name] is ticket for name, ticket in own.items())
            assert self.oldest(model) == min(map(_rank, own.values()), default=None), model
        ends = [ticket.submit.latest_end for ticket in self]
        assert self.latest_end == min(ends, default=float("inf"))
        running = {ticket.request_id for own in self._running.values() for ticket in own.values()}
        assert running == tickets.keys() - self._waiting.keys()
        expiries = [ticket.expires for ticket in self._waiting.values() if not ticket.is_started]
        assert self.next_expiry == min(expiries, default=float("inf"))


def _rank(ticket: Ticket) -> Rank:
    return (ticket.submit.arrival, ticket.request_id, 0)
