"""Checks a request at the worker's door: what can never be served is refused at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prism.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from prism.messages import Submit
from prism.tenants import has_room
from prism.types import ModelState, TenantId
from prism.worker.models import Model
from prism.worker.requests import Ticket

if TYPE_CHECKING:
    from prism.worker.loop import Worker


LACKING_SECONDS = 30.0
"""After which a client may ask again for a model that waits for an administrator."""


def check_submit(worker: Worker, ticket: Ticket, now: float) -> None:
    """Raises a `RequestError` if the request cannot enter the queue; may clip a default max_tokens.

    1. An unknown model.
    2. A full queue, unless its tenant has little there.
    3. A model whose last load failed a moment ago.
    4. A model for which pinned ones leave no room, or a context that it or its memory can never hold.
    5. Tokens outside the vocabulary, which would end the worker as an index on the device.
    """
    submit = ticket.submit
    model = worker.models.get(submit.model)
    if model is None:  # 1
        raise ModelNotFound(f"model {submit.model!r} does not exist", param="model")
    if not _has_room(worker, submit):  # 2
        raise Overloaded(
            f"the queue is full ({worker.limits.max_queue} requests)", retry_after=worker.queue_seconds(model)
        )
    if model.state is ModelState.FAILED and (now < model.retry_at or model.is_barred):  # 3
        raise Unavailable(
            f"model {model.name} cannot be loaded: {model.error}", retry_after=max(1.0, model.retry_at - now)
        )
    limit = worker.max_len(model)  # 4
    if (error := no_room(worker, model)) is not None:
        raise error
    if limit is not None:
        _check_length(ticket, limit)
    if model.profile is not None:  # 5
        _check_tokens(submit, model.profile.spec.vocab_size)


def no_room(worker: Worker, model: Model) -> Unavailable | None:
    """For all requests of a model that can hold no token beside pinned ones: it is no mistake of theirs."""
    lacking = worker.room.lacking(model) if worker.max_len(model) == 0 else None
    if lacking is None:
        return None
    return Unavailable(f"model {model.name} cannot be served: {lacking}", retry_after=LACKING_SECONDS)


def _has_room(worker: Worker, submit: Submit) -> bool:
    limit, num_waiting = worker.limits.max_queue, worker.requests.num_waiting
    if num_waiting < limit or submit.tenant is None:
        return num_waiting < limit
    tenant = worker.accounts.tenants.get(TenantId(submit.tenant))
    num_own = sum(t.submit.tenant == submit.tenant for t in worker.requests.waiting)
    return tenant is not None and has_room(limit, num_waiting, num_own, tenant.part)


def _check_tokens(submit: Submit, size: int) -> None:
    params = submit.params
    fields: dict[str, Iterable[int]] = {
        "prompt": submit.prompt,
        "stop_token_ids": params.stop_token_ids,
        "logit_bias": params.logit_bias,
    }
    for name, tokens in fields.items():
        bad = next((token for token in tokens if not 0 <= token < size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {size}", param=name)


def _check_length(ticket: Ticket, limit: int) -> None:
    submit = ticket.submit
    room = limit - len(submit.prompt)
    if room <= ticket.num_resumed and submit.resumed:
        raise Unavailable(f"the KV limit of model {ticket.model} was lowered to {limit} tokens")
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
