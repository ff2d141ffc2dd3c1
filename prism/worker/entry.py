"""Checks a request at the worker's door: what can never be served is refused at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prism.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from prism.types import ModelState
from prism.worker.requests import Ticket

if TYPE_CHECKING:
    from prism.worker.loop import Worker


def check_submit(worker: Worker, ticket: Ticket, now: float) -> None:
    """Raises a `RequestError` if the request cannot enter the queue; may clip a default max_tokens.

    1. An unknown model.
    2. A full queue.
    3. A model whose last load failed a moment ago.
    4. A context that the model, or the memory it may have, can never hold.
    5. Tokens outside the vocabulary.
    """
    submit = ticket.submit
    model = worker.models.get(submit.model)
    if model is None:  # 1
        raise ModelNotFound(f"model {submit.model!r} does not exist", param="model")
    if worker.requests.num_waiting >= worker.limits.max_queue:  # 2
        raise Overloaded(
            f"the queue is full ({worker.limits.max_queue} requests)", retry_after=worker.queue_seconds()
        )
    if model.state is ModelState.FAILED and now < model.retry_at:  # 3
        raise Unavailable(
            f"model {model.name} cannot be loaded: {model.error}", retry_after=max(1.0, model.retry_at - now)
        )
    limit = worker.max_len(model)  # 4
    if limit is not None:
        _check_length(ticket, limit)
    if model.profile is not None:  # 5
        size = model.profile.spec.vocab_size
        if bad := next((t for t in submit.prompt if not 0 <= t < size), None):
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {size}", param="prompt")


def _check_length(ticket: Ticket, limit: int) -> None:
    submit = ticket.submit
    room = limit - len(submit.prompt)
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {len(submit.prompt)} tokens; the model's context, within the memory it may "
            f"use here, holds {limit} with at least one of output",
            param="prompt",
        )
    if submit.params.max_tokens > room:
        if not submit.clip_max_tokens:
            raise ContextLengthExceeded(
                f"{len(submit.prompt)} prompt tokens and max_tokens {submit.params.max_tokens} pass the "
                f"context of {limit} tokens",
                param="max_tokens",
            )
        ticket.clip(room)
