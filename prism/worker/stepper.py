"""Queues steps on the lanes of a device and commits what has run.

A lane has at most two steps queued: the next one is made and queued while the present one runs. Nothing here
waits but `drain`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from prism.engine.engine import Drawn
from prism.errors import DriverError
from prism.types import RequestId
from prism.worker import turns
from prism.worker.delivery import Delivery
from prism.worker.device import Device
from prism.worker.host_kv import HostKv
from prism.worker.lanes import Flight, Lane
from prism.worker.models import Model
from prism.worker.reclaimer import Reclaimer
from prism.worker.requests import Requests, Ticket
from prism.worker.usage import DeviceTime
from prism.worker.views import neighbours_decode, turn_snapshot

MAX_QUEUED = 2
"""Steps on a lane: one that runs, and one that keeps the device busy meanwhile."""
DRAIN_SECONDS = 30.0
"""Longer than any two steps take. A device that hangs ends the worker, and the agent starts another."""
LOOK_SECONDS = 20e-6
"""Between two looks at a busy device when there is nothing else to do; other threads run meanwhile."""


class Listener(Protocol):
    """What the owner of the requests does when steps have run."""

    def request_completed(self, ticket: Ticket) -> None:
        """Its last token has been drawn and will be sent."""
        ...

    def memory_changed(self) -> None:
        """What could not run for want of memory is worth another look."""
        ...


class Stepper:
    """All lanes of one device."""

    def __init__(
        self,
        device: Device,
        models: Mapping[str, Model],
        requests: Requests,
        reclaimer: Reclaimer,
        host: HostKv,
        delivery: Delivery,
        listener: Listener,
        clock: Callable[[], float],
        *,
        max_batch_tokens: int,
        patience: float,
    ) -> None:
        """Who lacks memory for a step is tried again after `patience` seconds, or when memory changes."""
        self._device = device
        self._models = models
        self._requests = requests
        self._reclaimer = reclaimer
        self._host = host
        self._delivery = delivery
        self._listener = listener
        self._clock = clock
        self._max_batch_tokens = max_batch_tokens
        self._patience = patience
        self._num_free = device.pool.num_free
        """Free slabs at the last look."""
        self._device_time = DeviceTime()

    # --- towards the device ---------------------------------------------------------------------------

    def step(self, now: float) -> bool:
        """Queue a step on each lane that has room for one; whether anything came of it."""
        stepped = [self._step(lane, now) for lane in self._device.lanes]
        return any(stepped)

    def _step(self, lane: Lane, now: float) -> bool:
        if not self._has_room(lane):
            return False
        snapshot = turn_snapshot(self._models, self._requests, self._max_batch_tokens, lane, now)
        turn = turns.decide(snapshot, now)
        if turn is None:
            return False
        model = self._models[turn.model]
        engine = model.engine
        assert engine is not None
        model.last_turn = now
        wanted = engine.scheduler.blocks_wanted(turn.budget)
        self._reclaimer.ensure_kv(model, wanted, self._reclaimer.rank(model), now)
        step = engine.schedule(turn.budget)
        if step is None:
            model.stalled_until = now + self._patience
            return True
        self._announce(model, {RequestId(chunk.sequence.request_id) for chunk in step.chunks})
        self._device.take_turns(lane, step)
        self._host.save_dropped(model, step.dropped)
        self._host.fetch(model, step.fetches)
        begin = self._clock()
        flight = engine.run(step)
        lane.queue(model.name, flight, flight, begin)
        self.collect()
        return True

    def _has_room(self, lane: Lane) -> bool:
        """Behind prompts nothing more is queued while neighbours decode: their next step comes first."""
        if lane.num_steps >= MAX_QUEUED:
            return False
        has_prompts = any(flight.has_prompts for flight in lane.flights)
        return not (has_prompts and neighbours_decode(self._models, lane))

    def _announce(self, model: Model, running: set[RequestId]) -> None:
        """Tell gateways what starts, before it could kill this process."""
        assert model.engine is not None
        for request_id in running:
            ticket = self._requests.get(request_id)
            if ticket is not None and not ticket.is_started:
                ticket.is_started = True
                model.usage.num_requests += 1
                model.usage.prompt_tokens += len(ticket.submit.prompt)
                sequences = model.engine.scheduler.sequences_of(request_id)
                self._delivery.started(ticket, sequences, self._clock())

    # --- and back -------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Commit, in order, what has run on any lane, and tell when slabs have become free."""
        pool = self._device.pool
        self._host.settle()
        for lane in (*self._device.lanes, self._device.swap):
            for flight in lane.finished():
                self._commit(lane, flight)
            pool.completed(lane.lane_id, lane.num_completed)
        if pool.num_free > self._num_free:  # whoever gave them back, a compaction between two rounds too
            self._listener.memory_changed()
        self._num_free = pool.num_free

    def drain(self, model: Model) -> None:
        """Wait for a model's queued steps and commit them. Raises `DriverError` if they never end."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while model.engine is not None and model.engine.num_queued:
            assert model.lane is not None
            for flight in model.lane.finished():
                self._commit(model.lane, flight)
            if time.monotonic() > deadline:
                raise DriverError("step", f"not done within {DRAIN_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)

    def _commit(self, lane: Lane, flight: Flight) -> None:
        model = self._models[flight.model]
        if flight.step is not None:
            assert model.engine is not None
            now = self._clock()
            self._host.prompts_ran(
                model.name, flight.num_prompt_tokens, now - max(flight.begin, lane.last_end)
            )
            lane.last_end = now
            model.usage.device_seconds += self._device_time.ended(flight.begin, now)
            model.stalled_until = 0.0  # what waited for these tokens, or for a place, may go on
            self._account(model, model.engine.commit(flight.step))

    def _account(self, model: Model, drawn: list[Drawn]) -> None:
        """Send a step's tokens and close what has ended."""
        now = self._clock()
        model.last_used = now
        model.usage.decoded_tokens += len(drawn)
        pairs = []
        for item in drawn:
            ticket = self._requests.get(item.sequence.request_id)
            assert ticket is not None
            ticket.last_token = now
            pairs.append((ticket, item))
            if item.finish is not None:
                ticket.finish_choice(item.sequence.choice)
                if not ticket.open_choices:
                    self._listener.request_completed(ticket)
        self._delivery.outputs(pairs)
