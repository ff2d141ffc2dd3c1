"""The requests that a worker holds, from `Submit` to their one end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from prism.messages import ResumedChoice, Submit
from prism.types import GatewayId, ModelId, RequestId
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
    due: float | None = None
    """When its next token is due; None before it is known."""
    queue_position: int = 0
    estimated_seconds: float = 0.0
    """What it was told when it came."""
    waiting: WaitingRequest | None = None
    """What admission sees of it, as long as that holds."""
    resumed: dict[int, ResumedChoice] = field(default_factory=dict)

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

    @property
    def next_deadline(self) -> float:
        """When its next token is due."""
        return self.submit.arrival + self.submit.slo.ttft if self.due is None else self.due

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

    def got_tokens(self, now: float) -> None:
        """A step has drawn tokens for it, one for each of its choices at most.

        Tokens are due one TPOT objective apart from the first one on, so that what came early may be made use
        of; but no more than `BANKED` of it, lest a stream that was quick stands still.
        """
        tpot = self.submit.slo.tpot
        if self.last_token is None or self.due is None:
            self.due = now + tpot
        elif now > self.last_token:
            self.due = min(self.due + tpot, now + BANKED * tpot)
        self.last_token = now

    def clip(self, max_tokens: int) -> None:
        """Lower a default max_tokens to what memory can hold."""
        params = msgspec.structs.replace(self.submit.params, max_tokens=max_tokens)
        self.submit = msgspec.structs.replace(self.submit, params=params)
        self.waiting = None

    def finish_choice(self, choice: int) -> None:
        """The choice has ended and is never run again."""
        self.waiting = None
        self.resumed[choice] = ResumedChoice(choice=choice, token_ids=[], finished=True)


class Requests:
    """All tickets, by request and by model."""

    def __init__(self) -> None:
        self._tickets: dict[RequestId, Ticket] = {}
        self._by_model: dict[ModelId, dict[RequestId, Ticket]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(tuple(self._tickets.values()))

    def get(self, request_id: RequestId) -> Ticket | None:
        """The ticket, if it has not ended."""
        return self._tickets.get(request_id)

    def add(self, ticket: Ticket) -> None:
        """A new request."""
        assert ticket.request_id not in self._tickets
        self._tickets[ticket.request_id] = ticket
        self._by_model.setdefault(ticket.model, {})[ticket.request_id] = ticket

    def remove(self, ticket: Ticket) -> None:
        """The request has ended."""
        del self._tickets[ticket.request_id]
        del self._by_model[ticket.model][ticket.request_id]

    def of_model(self, model: ModelId) -> tuple[Ticket, ...]:
        """A model's tickets in order of arrival here."""
        return tuple(self._by_model.get(model, {}).values())

    def has_waiting(self, model: ModelId) -> bool:
        """One of a model's is outside of its engine."""
        return any(not ticket.is_running for ticket in self._by_model.get(model, {}).values())

    def of_gateway(self, gateway: GatewayId) -> tuple[Ticket, ...]:
        """What one gateway has sent."""
        return tuple(t for t in self._tickets.values() if t.gateway == gateway)

    @property
    def num_waiting(self) -> int:
        """Requests outside of any engine."""
        return sum(not ticket.is_running for ticket in self._tickets.values())
