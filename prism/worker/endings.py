"""How requests end: each once, whatever ends it, and what it held goes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prism.errors import Overloaded, RequestError, Unavailable
from prism.types import ModelState
from prism.worker.delivery import Delivery
from prism.worker.entry import no_room
from prism.worker.models import Model
from prism.worker.requests import Ticket
from prism.worker.stepper import Stepper

if TYPE_CHECKING:
    from prism.worker.loop import Worker


class Endings:
    """Of all requests of a worker."""

    def __init__(
        self, worker: Worker, delivery: Delivery, stepper: Stepper, clock: Callable[[], float]
    ) -> None:
        self._worker = worker
        self._delivery = delivery
        self._stepper = stepper
        self._clock = clock

    def end(self, ticket: Ticket) -> None:
        """Forget a request, running or not."""
        worker, model = self._worker, self._worker.models[ticket.model]
        if ticket.is_running:
            self._stepper.drop_early(model, half_launched_only=True)
        worker.requests.remove(ticket)
        model.last_used = self._clock()
        if ticket.is_running and model.engine is not None:
            model.engine.cancel(ticket.request_id)
            worker.reclaimer.trim(model)
        worker.memory_changed()

    def drop_choice(self, ticket: Ticket, choice: int) -> None:
        """Forget one of a request's choices, and the request with its last."""
        worker, model = self._worker, self._worker.models[ticket.model]
        if ticket.is_running:
            self._stepper.drop_early(model, half_launched_only=True)
        ticket.finish_choice(choice)
        if ticket.is_running and model.engine is not None:
            model.engine.cancel(ticket.request_id, choice)
            worker.reclaimer.trim(model)
        worker.memory_changed()
        if not ticket.open_choices:
            self.end(ticket)

    def refuse(self, ticket: Ticket, error: RequestError) -> None:
        """End it, and tell why."""
        self.end(ticket)
        self._delivery.rejected(ticket, error)

    def give_back(self, model: Model) -> None:
        """What waits for a model that goes elsewhere is for another worker; nothing of it runs any more."""
        for ticket in self._worker.requests.of_model(model.name):
            self.end(ticket)
            self._delivery.returned(ticket)

    def model_failed(self, model: Model) -> None:
        """Refuse what waits for a model that cannot be loaded."""
        wait = max(1.0, model.retry_at - self._clock())
        for ticket in self._worker.requests.of_model(model.name):
            message = f"model {model.name} cannot be loaded: {model.error}"
            self.refuse(ticket, Unavailable(message, retry_after=wait))

    def capacity_changed(self, model: Model, capacity: int) -> None:
        """What cannot fit any more ends now instead of waiting for room for ever."""
        for ticket in self._worker.requests.of_model(model.name):
            if _num_tokens(model, ticket) >= capacity:
                message = f"the KV limit of model {model.name} was lowered to {capacity} tokens"
                self.refuse(ticket, no_room(self._worker, model) or Unavailable(message))

    def look_for_overdue(self, now: float) -> None:
        """Refuse what has taken too long altogether."""
        while (ticket := self._worker.requests.overdue(now)) is not None:
            self.refuse(ticket, Unavailable("the request took longer than limits.request_timeout"))

    def expired(self, ticket: Ticket) -> None:
        """It has waited too long for its start."""
        model, most = self._worker.models[ticket.model], self._worker.limits.max_wait
        model.usage.num_late += ticket.is_late(self._clock())
        error: RequestError
        if model.state is ModelState.FAILED:
            error = Unavailable(f"model {model.name} cannot be loaded: {model.error}", retry_after=5.0)
        else:
            error = Overloaded(
                f"no capacity within limits.max_wait ({most:g} s)",
                retry_after=self._worker.queue_seconds(model),
            )
        self.refuse(ticket, error)


def _num_tokens(model: Model, ticket: Ticket) -> int:
    if ticket.is_running and model.engine is not None:
        return model.engine.num_tokens(ticket.request_id)
    return len(ticket.submit.prompt) + ticket.num_resumed
