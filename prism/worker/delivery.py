"""Turns what happened to requests into messages for their gateways."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prism.engine.engine import Drawn
from prism.engine.sequence import Sequence
from prism.errors import RequestError
from prism.messages import Output, Outputs, Rejected, Returned, Started, Token
from prism.types import GatewayId, Incarnation
from prism.worker.outbox import Outbox
from prism.worker.requests import Ticket


class Delivery:
    """Speaks for one incarnation of a worker."""

    def __init__(self, outbox: Outbox, incarnation: Incarnation) -> None:
        self._outbox = outbox
        self._incarnation = incarnation

    def started(self, ticket: Ticket, sequences: Iterable[Sequence], now: float) -> None:
        """The request runs for the first time in this attempt."""
        message = Started(
            request_id=ticket.request_id,
            attempt=ticket.attempt,
            incarnation=self._incarnation,
            queue_seconds=max(0.0, now - ticket.submit.arrival),
            cached_tokens=max((s.num_cached for s in sequences), default=0),
            queue_position=ticket.queue_position,
            estimated_seconds=ticket.estimated_seconds,
        )
        self._outbox.to_gateway(ticket.gateway, message)

    def outputs(self, tickets: Iterable[Ticket], drawn: Drawn) -> None:
        """A step's tokens, one message a gateway; `tickets` are those of the sequences, in their order."""
        tokens: defaultdict[GatewayId, list[Token]] = defaultdict(list)
        outputs: defaultdict[GatewayId, list[Output]] = defaultdict(list)
        special = drawn.ends.keys() | drawn.logprobs.keys()
        rows = zip(tickets, drawn.sequences, drawn.numbers, drawn.tokens, strict=True)
        for place, (ticket, sequence, number, token) in enumerate(rows):
            if place in special:
                outputs[ticket.gateway].append(_output(ticket, drawn, place))
            else:
                new = Token(sequence.request_id, ticket.attempt, sequence.choice, number, token)
                tokens[ticket.gateway].append(new)
        for gateway in tokens.keys() | outputs.keys():
            message = Outputs(incarnation=self._incarnation, tokens=tokens[gateway], items=outputs[gateway])
            self._outbox.to_gateway(gateway, message)

    def rejected(self, ticket: Ticket, error: RequestError) -> None:
        """The request has ended without its last token."""
        message = Rejected(
            request_id=ticket.request_id,
            attempt=ticket.attempt,
            incarnation=self._incarnation,
            error=error.wire(),
        )
        self._outbox.to_gateway(ticket.gateway, message)

    def returned(self, ticket: Ticket) -> None:
        """Another worker is to go on with the request."""
        message = Returned(
            request_id=ticket.request_id,
            attempt=ticket.attempt,
            incarnation=self._incarnation,
        )
        self._outbox.to_gateway(ticket.gateway, message)


def _output(ticket: Ticket, drawn: Drawn, place: int) -> Output:
    end, logprob = drawn.ends.get(place), drawn.logprobs.get(place)
    has_token = end is None or end.stop_token is None
    return Output(
        request_id=ticket.submit.request_id,
        attempt=ticket.attempt,
        choice=drawn.sequences[place].choice,
        index=drawn.numbers[place],
        token_ids=[drawn.tokens[place]] if has_token else [],
        logprobs=[logprob] if logprob is not None and has_token else None,
        finish=None if end is None else end.finish,
        stop_token=None if end is None else end.stop_token,
    )
