"""Queues steps on the lanes of a device and commits what has run.

A lane has at most two steps queued. The next one is chosen when the present one is about to end: late, so
that whoever comes meanwhile has a say, and so soon that the device does not wait for it. A step that takes
long to launch is launched in slices, and other lanes go on in between. Nothing here waits but `drain`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from prism.engine.engine import Drawn
from prism.engine.sequence import Sequence
from prism.engine.step import Step
from prism.errors import DriverError
from prism.messages import ResumedChoice
from prism.modes import Rules
from prism.types import ModelId, RequestId
from prism.worker.candidates import Candidates
from prism.worker.cost_book import CostBook, Expected
from prism.worker.delivery import Delivery
from prism.worker.device import Device
from prism.worker.early import SLICE_SECONDS, EarlySteps
from prism.worker.host_kv import HostKv
from prism.worker.lanes import Deferred, Flight, Lane, had_device_alone
from prism.worker.models import Model
from prism.worker.reclaimer import Reclaimer
from prism.worker.requests import Requests, Ticket, got_tokens
from prism.worker.usage import DeviceTime

MAX_QUEUED = 2
"""Steps on a lane: one that runs, and one that keeps the device busy meanwhile."""
LEAD_SECONDS = 0.0015
"""Before the earliest end of the present step: a round of the loop, and the launch of what comes next."""
MOST_MAKING = 0.005
"""Of the time that steps take to make which is added to that: what takes longer was waiting for memory."""
FORGETTING = 0.98
"""What the longest of it still counts when another step has been made."""
DRAIN_SECONDS = 30.0
"""Longer than any two steps take. A device that hangs ends the worker, and the agent starts another."""
LOOK_SECONDS = 20e-6
"""Between two looks at a busy device when there is nothing else to do; other threads run meanwhile."""
LONG_SLICE_SECONDS = 0.002
"""Of launches while no other lane has work: only messages wait then."""


class StepAlone(NamedTuple):
    """A step that had the device to itself."""

    model: ModelId
    expected: Expected
    seconds: float


class Listener(Protocol):
    """What the owner of the requests does when steps have run."""

    def request_completed(self, ticket: Ticket) -> None:
        """Its last token has been drawn and will be sent."""
        ...

    def step_made(self, model: Model, step: Step) -> None:
        """It is about to run."""
        ...

    def prompts_computed(self) -> None:
        """A step with prompts has run."""
        ...

    def memory_changed(self) -> None:
        """What could not run for want of memory is worth another look."""
        ...

    def requests_suspended(self, choices: dict[RequestId, list[ResumedChoice]]) -> None:
        """Running requests have lost their place and wait again."""
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
        costs: CostBook,
        rules: Rules,
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
        self._costs = costs
        self._delivery = delivery
        self._listener = listener
        self._clock = clock
        self._patience = patience
        self._candidates = Candidates(device.lanes, models, requests, costs, rules, max_batch_tokens)
        self._num_free = device.pool.num_free
        """Free slabs at the last look."""
        self._completed = [0] * len(device.all_lanes)
        """Work of each lane that has run, as far as the pool has been told."""
        self._device_time = DeviceTime()
        self._making = [0.0] * len(device.lanes)
        """Seconds that a step of each lane takes to make, the longest of late."""
        self._early = EarlySteps(
            device,
            models,
            reclaimer,
            host,
            self,
            listener.requests_suspended,
            max_batch_tokens=max_batch_tokens,
            patience=patience,
            clock=clock,
        )

    # --- towards the device ---------------------------------------------------------------------------

    def step(self, now: float) -> bool:
        """On each lane launch more of the last step, or make the next one; whether anything came of it."""
        stepped = [self._step(lane, now) for lane in self._device.lanes]
        return self._early.step(now) or any(stepped)

    def _step(self, lane: Lane, now: float) -> bool:
        if lane.launching is not None:
            return self._launch(lane)
        if not self._has_room(lane, now):
            return False
        start = self._clock()
        turn = self._candidates.turn(lane, now)
        if turn is None:
            return False
        model = self._models[turn.model]
        engine = model.engine
        assert engine is not None
        model.last_turn = now
        self._reclaimer.ensure_kv(model, engine.scheduler.wants(turn.budget), now)
        step = engine.schedule(turn.budget)
        if step is None:
            model.stalled_until = now + self._patience
            return True
        self.announce(model, step)
        if step.dropped:
            self._host.save_dropped(model, step.dropped)
        self._host.fetch(model, step.fetches)
        after = self._device.neighbours(lane, step)
        begin = self._clock()
        work = engine.run(step)
        flight = lane.queue(model.name, work, work, begin)
        flight.after = after
        flight.expected = self._costs.expect(model.name, step)
        making = min(self._clock() - start, MOST_MAKING)
        self._making[lane.lane_id] = max(making, FORGETTING * self._making[lane.lane_id])
        self._launch(lane)
        return True

    def _launch(self, lane: Lane, seconds: float | None = None) -> bool:
        """Launch a slice of the lane's last step, and the copies behind it; whether anything came of it.

        One that runs behind steps of other lanes begins when those have been launched: a wait for what is not
        on the device would be none.
        """
        if seconds is None:
            is_alone = not any(other.flights for other in self._device.lanes if other is not lane)
            seconds = LONG_SLICE_SECONDS if is_alone else SLICE_SECONDS
        has_advanced = False
        while (flight := lane.launching) is not None and flight.may_be_launched:
            if isinstance(flight.work, Deferred):
                flight.work.launch()
                has_advanced = True
                continue
            assert flight.step is not None
            self._device.take_turns(lane, flight)
            has_advanced = flight.step.launch(None, seconds) or has_advanced
            if not flight.is_launched:
                break
        if has_advanced:
            self.collect()
        return has_advanced

    def _has_room(self, lane: Lane, now: float) -> bool:
        """None before the present step is about to end, nor behind two.

        Behind prompts nothing more is queued while neighbours decode: their next step comes first.
        """
        steps = lane.steps
        if not steps:
            return True
        if len(steps) >= MAX_QUEUED or now < lane.earliest_end(steps[0]) - self._lead:
            return False
        return not (steps[0].has_prompts and self._candidates.neighbours_decode(lane))

    @property
    def _lead(self) -> float:
        """Lanes have their turns one after the other, so one may have to wait for what others make."""
        lanes = zip(self._device.lanes, self._making, strict=True)
        return LEAD_SECONDS + sum(making for lane, making in lanes if lane.flights)

    def announce(self, model: Model, step: Step) -> None:
        """Tell gateways what starts, before it could kill this process."""
        assert model.engine is not None
        self._listener.step_made(model, step)
        new = [sequence for sequence in step.begun if not sequence.is_started]
        new += [chunk.sequence for chunk in step.prompts]
        for request_id in {sequence.request_id for sequence in new}:
            ticket = self._requests.get(request_id)
            if ticket is not None and not ticket.is_started:
                ticket.is_started = True
                model.usage.num_requests += 1
                model.usage.prompt_tokens += len(ticket.submit.prompt)
                sequences = model.engine.scheduler.sequences_of(request_id)
                self._delivery.started(ticket, sequences, self._clock())

    def check(self) -> None:
        """What is kept of models for the choice of their turns holds."""
        self._candidates.check()

    # --- and back -------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Commit, in order, what has run on any lane, and tell when slabs have become free."""
        pool = self._device.pool
        self._host.settle()
        for lane in self._device.all_lanes:
            if lane.flights:
                self._collect(lane)
            if lane.num_completed != self._completed[lane.lane_id]:
                self._completed[lane.lane_id] = lane.num_completed
                pool.completed(lane.lane_id, lane.num_completed)
        for lane in self._device.lanes:
            for flight in lane.flights:
                if flight.after:
                    flight.look(self._clock())
        num_free = pool.num_free
        if num_free > self._num_free:  # whoever gave them back, a compaction between two rounds too
            self._listener.memory_changed()
        self._num_free = num_free

    def _collect(self, lane: Lane) -> None:
        """When what was found to have run together has ended, one by one, nobody knows."""
        ran = [
            self._has_run(lane, flight, is_timed=place == 0) for place, flight in enumerate(lane.finished())
        ]
        if len(ran) == 1 and (alone := ran[0]) is not None:
            self._costs.ran_alone(*alone)

    def drain(self, model: Model) -> None:
        """Wait for a model's queued steps and commit them. Raises `DriverError` if they never end."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while model.engine is not None and model.engine.num_queued:
            assert model.lane is not None
            for lane in self._device.lanes:  # its steps may have to be launched behind those of others
                self._launch(lane, seconds=float("inf"))
            if model.early is not None:
                self._early.go_on(model, model.early)
            for flight in model.lane.finished():
                self._has_run(model.lane, flight, is_timed=False)
            if time.monotonic() > deadline:
                raise DriverError("step", f"not done within {DRAIN_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)

    def drop_early(self, model: Model, *, half_launched_only: bool = False) -> None:
        """Forget what a loading model was given to run; with the option only what its lane does not count."""
        if half_launched_only and (model.early is None or model.early.number):
            return
        self._early.drop(model)

    def _has_run(self, lane: Lane, flight: Flight, *, is_timed: bool) -> StepAlone | None:
        """Of several that are found to have run at a time, only the first one's end was seen.

        The result is of a step that had the device to itself.
        """
        if flight.step is None:
            return None
        now, begin = self._clock(), max(flight.begin, lane.last_end)
        seconds = now - begin
        lane.last_end = now
        if self._models[flight.model].early is flight:
            return None  # its model is not active yet, and it was launched as weights arrived
        alone = None if flight.is_apart else self._timed(lane, flight, begin, seconds, is_timed=is_timed)
        share = self._device_time.ended(flight.begin, now)
        is_urgent = flight.has_prompts or self._requests.has_waiting(flight.model)
        tpot = self.commit(flight)
        self._models[flight.model].usage.ran(share, seconds, now, None if is_urgent else tpot)
        return alone

    def _timed(
        self, lane: Lane, flight: Flight, begin: float, seconds: float, *, is_timed: bool
    ) -> StepAlone | None:
        """Note what a step took."""
        assert flight.step is not None
        expected = flight.expected or self._costs.expect(flight.model, flight.step.step)
        self._costs.ran(flight.model, expected, seconds, is_timed=is_timed)
        if not had_device_alone(flight, begin, lane, self._device.lanes):
            return None
        return StepAlone(flight.model, expected, seconds)

    def commit(self, flight: Flight) -> float:
        """Account for work that has run; the tightest objective of the streams that have drawn a token."""
        model = self._models[flight.model]
        if flight.step is None:
            return float("inf")
        assert model.engine is not None
        model.stalled_until = 0.0  # what waited for these tokens, or for a place, may go on
        if flight.has_prompts:
            self._listener.prompts_computed()
        return self._account(model, model.engine.commit(flight.step))

    def _account(self, model: Model, drawn: Drawn) -> float:
        """Send a step's tokens and close what has ended; the tightest objective of its streams."""
        now = self._clock()
        model.last_used = now
        if model.kv is not None:
            model.use_times.saw(model.kv.num_uses, now)
        if model.engine is not None:
            scheduler = model.engine.scheduler
            model.cache_hits.saw(scheduler.num_looked_up, scheduler.num_found)
        model.usage.decoded_tokens += len(drawn)
        tickets = self._requests.of_sequences(drawn.sequences)
        first = {ticket for ticket in tickets if ticket.last_token is None}  # of several choices, perhaps
        model.usage.num_late += sum([ticket.is_late(now) for ticket in first])
        got_tokens(tickets, now)
        for place in drawn.ends:
            self._choice_ended(model, tickets[place], drawn.sequences[place])
        self._delivery.outputs(tickets, drawn)
        return min([ticket.tpot for ticket in tickets], default=float("inf"))

    def _choice_ended(self, model: Model, ticket: Ticket, sequence: Sequence) -> None:
        model.output_lengths.add(sequence.num_output)
        ticket.finish_choice(sequence.choice)
        if not ticket.open_choices:
            self._listener.request_completed(ticket)
