"""Who has a device in the modes in which not everybody may come: all that fit, for good, or one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prism.errors import DeviceTooSmall
from prism.modes import kv_shares, least_kv
from prism.types import ModelId
from prism.worker import timeshare
from prism.worker.models import Model
from prism.worker.requests import Ticket
from prism.worker.timeshare import Contender, Present, Queue, Waiting
from prism.worker.views import ready_in, waiting_request

if TYPE_CHECKING:
    from prism.worker.loop import Worker


def settle_residents(worker: Worker, device: int) -> None:
    """Modes static and elastic: the models of this device keep their weights there from the start.

    In the order of the configuration, as far as weights and a least of KV fit; the others fail. They are
    bound to lanes in that order, whichever is packed first, so one server is like another. With fixed shares
    all that is left is divided (`kv_shares`), and each has its part as floor and limit.
    """
    room = worker.device.num_slabs
    least = least_kv(room, worker.device.slab_bytes)
    residents: list[Model] = []
    for model in worker.models.values():
        if model.config.device not in (None, device):
            continue
        worker.learn(model)
        if model.profile is None:
            continue
        needed = model.profile.weight_slabs + max(least, model.kv_floor)
        if needed > room:
            model.is_barred = True
            text = f"all models stay on the device in this mode; {needed} slabs are needed, {room} are left"
            worker.residency.fail(model, DeviceTooSmall(text))
            continue
        room -= needed
        model.pinned = model.is_wanted = True
        model.lane = worker.device.bind()
        residents.append(model)
    if worker.rules.has_shares and residents:
        floors = [max(least, model.kv_floor) for model in residents]
        loads = [model.config.expected_load for model in residents]
        for model, share in zip(residents, kv_shares(room + sum(floors), floors, loads), strict=True):
            model.kv_floor = model.kv_limit = share


class Tenancy:
    """Mode timeshare: which model has the device, and since when."""

    def __init__(self, quantum: float, clock: Callable[[], float]) -> None:
        self._quantum = quantum
        self._clock = clock
        self._tenant: ModelId | None = None
        self._since = 0.0

    def wanted(self, worker: Worker, now: float) -> list[Model]:
        """The one model that should be there, if any; the others leave or stay away."""
        contenders = [_contender(worker, model) for model in worker.models.values()]
        choice = timeshare.decide(contenders, self._tenant, self._since, self._quantum, now)
        if choice.model != self._tenant:
            self._tenant, self._since = choice.model, now
        for model in worker.models.values():
            is_tenant = model.name == choice.model
            model.is_open = is_tenant and choice.is_open
            if not is_tenant and model.is_active:
                worker.evict(model)
        if choice.model is None:
            return []
        tenant = worker.models[choice.model]
        if not tenant.is_active:
            self._since = now  # its time begins when it is there
        return [tenant] if tenant.is_wanted or worker.requests.has_any(choice.model) else []

    def starts_in(self, worker: Worker, model: Model, arrival: float) -> float:
        """Seconds until a request of this model that came then, behind all that wait for it, would start."""
        queues = {each.name: _queue(worker, each) for each in worker.models.values()}
        own = queues[model.name]
        queues[model.name] = replace(own, waiting=(*own.waiting, Waiting(arrival, 0.0, 0.0)))
        name, coming, left = self._tenant, 0.0, self._quantum
        if name is not None and worker.models[name].is_active:
            left -= self._clock() - self._since
        elif name is not None:
            coming = queues[name].activation
        present = Present(name, 0.0 if name is None else _running_seconds(worker, worker.models[name]), left)
        batch = worker.max_batch_size
        return coming + timeshare.starts_in(queues, present, self._quantum, batch, model.name)


def _queue(worker: Worker, model: Model) -> Queue:
    """Those that wait run together, as many as a batch has."""
    tickets = [ticket for ticket in worker.requests.of_model(model.name) if not ticket.is_running]
    batch = min(len(tickets), worker.max_batch_size)
    decodes = _decode_seconds(worker, model, tickets, batch) / max(1, batch)
    waiting = []
    for ticket in tickets:
        request = ticket.waiting or waiting_request(worker, ticket)
        waiting.append(Waiting(request.arrival, request.seconds, decodes))
    return Queue(sorted(waiting), ready_in(worker, model))


def _running_seconds(worker: Worker, model: Model) -> float:
    """Until what runs has ended, if no more comes."""
    running = [ticket for ticket in worker.requests.of_model(model.name) if ticket.is_running]
    return _decode_seconds(worker, model, running, len(running))


def _decode_seconds(worker: Worker, model: Model, tickets: Sequence[Ticket], batch: int) -> float:
    """Of a batch of such requests: steps for what one of them is expected to draw, by their means."""
    costs = worker.costs.of(model.name)
    if costs is None or not tickets:
        return 0.0
    context = sum(len(ticket.submit.prompt) for ticket in tickets) / len(tickets)
    most = sum(ticket.submit.params.max_tokens for ticket in tickets) / len(tickets)
    steps = min(model.output_lengths.expected_rest, most)
    return steps * costs.steps.decode(batch, round(batch * context))


def _contender(worker: Worker, model: Model) -> Contender:
    tickets = worker.requests.of_model(model.name)
    waiting = [ticket.submit.arrival for ticket in tickets if not ticket.is_running]
    if model.is_wanted and not model.is_active:  # by a command, or at start
        waiting.append(model.load_started)
    return Contender(
        model=model.name,
        oldest_waiting=min(waiting, default=None),
        is_busy=any(ticket.is_running for ticket in tickets),
    )
