"""Turns what happened to requests into messages for their gateways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prism.engine import sequence
from prism.engine.engine import Drawn
from prism.errors import RequestError
from prism.messages import Output, Outputs, Rejected, Returned, Started
from prism.types import GatewayId, Incarnation
from prism.worker.outbox import Outbox
from prism.worker.requests import Ticket


class Delivery:
    """Speaks for one incarnation of a worker."""

    def __init__(self, outbox: Outbox, incarnation: Incarnation) -> None:
        self._outbox = outbox
        self._incarnation = incarnation

    def started(self, ticket: Ticket, sequences: Sequence[sequence.Sequence], now: float) -> None:
        """The request runs for the first time in this attempt."""
        message = Started(
            request_id=ticket.request_id,
            attempt=ticket.submit.attempt,
            incarnation=self._incarnation,
            queue_seconds=max(0.0, now - ticket.submit.arrival),
            cached_tokens=max((s.num_cached for s in sequences), default=0),
            queue_position=ticket.queue_position,
            estimated_seconds=ticket.estimated_seconds,
        )
        self._outbox.to_gateway(ticket.gateway, message)

    def outputs(self, pairs: Iterable[tuple[Ticket, Drawn]]) -> None:
        """A step's tokens, one message a gateway."""
        by_gateway: dict[GatewayId, list[Output]] = {}
        for ticket, drawn in pairs:
            by_gateway.setdefault(ticket.gateway, []).append(_output(ticket, drawn))
        for gateway, items in by_gateway.items():
            self._outbox.to_gateway(gateway, Outputs(incarnation=self._incarnation, items=items))

    def rejected(self, ticket: Ticket, error: RequestError) -> None:
        """The request has ended without its last token."""
        message = Rejected(
            request_id=ticket.request_id,
            attempt=ticket.submit.attempt,
            incarnation=self._incarnation,
            error=error.wire(),
        )
        self._outbox.to_gateway(ticket.gateway, message)

    def returned(self, ticket: Ticket) -> None:
        """Another worker is to go on with the request."""
        message = Returned(
            request_id=ticket.request_id,
            attempt=ticket.submit.attempt,
            incarnation=self._incarnation,
        )
        self._outbox.to_gateway(ticket.gateway, message)


def _output(ticket: Ticket, drawn: Drawn) -> Output:
    return Output(
        request_id=ticket.submit.request_id,
        attempt=ticket.submit.attempt,
        choice=drawn.sequence.choice,
        index=drawn.number,
        token_ids=[] if drawn.token is None else [drawn.token],
        logprobs=None if drawn.logprob is None or drawn.token is None else [drawn.logprob],
        finish=drawn.finish,
        stop_token=drawn.stop_token,
    )
