"""The worker's loop: all mutable state of a device has its owner here.

One method for each event that can come in (`on_*`), and `advance`, which does the next piece of work:

    commit what has run -> move models in and out -> admit -> choose a turn on each lane -> schedule, run

Nothing here waits but for a model's own steps before it is evicted. Slow work (loading, unloading) runs
beside the loop and comes back as an event; steps are queued ahead (stepper.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from prism.config import Config, DeviceConfig
from prism.costs import Costs
from prism.engine.engine import EngineRequest
from prism.engine.step import Step
from prism.errors import RequestError
from prism.memory.slabs import KvOwner
from prism.messages import (
    Abandon,
    Activate,
    CancelChoice,
    Command,
    CommandDone,
    Evict,
    Homes,
    ResumedChoice,
    SetLimits,
    Submit,
)
from prism.modes import RULES, Mode
from prism.types import Bytes, Epoch, GatewayId, Incarnation, ModelState, RequestId, WorkerId
from prism.worker import admission
from prism.worker.accounts import Accounts
from prism.worker.arrivals import Arrivals
from prism.worker.commands import abandon, carry_out
from prism.worker.cost_book import CostBook
from prism.worker.delivery import Delivery
from prism.worker.device import Device
from prism.worker.endings import Endings
from prism.worker.entry import check_submit
from prism.worker.holdings import Holdings
from prism.worker.host_kv import HostKv
from prism.worker.loading import JobEvent
from prism.worker.memory_watch import MemoryWatch
from prism.worker.models import Model, limit_slabs, slabs_up
from prism.worker.outside import Outside
from prism.worker.rate import MOST_SECONDS, CompletionRate
from prism.worker.reclaimer import Reclaimer
from prism.worker.requests import Requests, Ticket
from prism.worker.rescue import end_standstill
from prism.worker.residency import Residency
from prism.worker.room import Room
from prism.worker.snapshot import FAR
from prism.worker.spare_room import SpareRoom
from prism.worker.standstill import STANDSTILL_SECONDS, Standstill
from prism.worker.stepper import Stepper
from prism.worker.tenancy import Tenancy, settle_residents
from prism.worker.turn_watch import TurnWatch
from prism.worker.usage import is_hopeful
from prism.worker.views import admission_snapshot, estimate, waiting_request

LEAST_PATIENCE = 0.05
"""Who lacks memory looks again after `min_residency`, when busy models may be evicted, but no sooner."""
ASIDE_SECONDS = 0.0003
"""What is done beside the steps at a time, between two rounds; captures pass it by half a layer at most."""


class Worker:
    """One device's models and requests."""

    def __init__(
        self,
        config: Config,
        device_config: DeviceConfig,
        device: Device,
        outside: Outside,
        *,
        name: WorkerId,
        incarnation: Incarnation,
        calibrated: Mapping[str, Costs] | None = None,
    ) -> None:
        """`calibrated` are costs by model that were measured beforehand."""
        self.name = name
        self.incarnation = incarnation
        self.epoch = Epoch(0)
        self.device = device
        self.limits = config.limits
        self.max_batch_tokens = device_config.max_batch_tokens
        self.max_batch_size = device_config.max_batch_size
        self.models = _new_models(config, name, device.slab_bytes)
        self.requests = Requests()
        self.registrations = outside.registrations
        self.costs = CostBook(device.rates, calibrated or {})
        self.host = HostKv(device, outside.chunks, self.costs)
        self.accounts = Accounts(config.server.tenants, self.requests, self.costs)
        self.rules = RULES[config.scheduling.mode]
        self.tenancy = Tenancy(config.scheduling.quantum, outside.clock)
        self.owed_to_late = 0.0
        """Seconds that late requests may take before others (worker/admission.py)."""
        self.watch = TurnWatch(name, computes_steps=device.device.type == "cpu")
        self.memory = MemoryWatch(device, name)
        self._outbox = outside.outbox
        self._clock = outside.clock
        self._needs_admission = False
        self._standstill = Standstill()
        self._rate = CompletionRate()
        self._delivery = Delivery(outside.outbox, incarnation)
        self._patience = max(LEAST_PATIENCE, self.limits.min_residency)
        self.room = Room(self.models, device.num_slabs)
        self.residency = Residency(device, outside, self.host, self.room, name, self.max_batch_size)
        self.holdings = self._make_holdings(config.scheduling.idle_threshold)
        self.reclaimer = Reclaimer(device, self.models, self.holdings, self.evict, self.host)
        self._spare_room = self._make_spare_room(is_used=config.scheduling.load_ahead)
        self._stepper = self._make_stepper()
        self._endings = Endings(self, self._delivery, self._stepper, outside.clock)
        self._arrivals = Arrivals(
            self, self._stepper, self._endings, self._spare_room, outside.registrations, outside.clock
        )
        if self.rules.is_resident:
            settle_residents(self, index_of(name))

    def _make_holdings(self, idle_threshold: float | None) -> Holdings:
        return Holdings(
            self.device.pool,
            self.models,
            self.requests,
            self.host,
            self.costs,
            min_residency=self.limits.min_residency,
            max_wait=self.limits.max_wait,
            idle_threshold=idle_threshold,
        )

    def _make_spare_room(self, *, is_used: bool) -> SpareRoom:
        return SpareRoom(
            self.device,
            self.models,
            self.holdings,
            self.residency,
            self.reclaimer,
            self.evict,
            self.learn,
            is_used=is_used and self.rules is RULES[Mode.PRISM],
        )

    def _make_stepper(self) -> Stepper:
        return Stepper(
            self.device,
            self.models,
            self.requests,
            self.reclaimer,
            self.host,
            self.costs,
            self.rules,
            self._delivery,
            self,
            self._clock,
            max_batch_tokens=self.max_batch_tokens,
            patience=self._patience,
        )

    # --- events ---------------------------------------------------------------------------------------

    def on_submit(self, gateway: GatewayId, submit: Submit) -> None:
        """A request, or a later attempt at one."""
        earlier = self.requests.get(RequestId(submit.request_id))
        if earlier is not None:
            if earlier.submit.attempt >= submit.attempt:
                return
            self._endings.end(earlier)
        expires = float("inf") if submit.resumed else submit.arrival + self.limits.max_wait
        ticket = Ticket(submit, gateway, expires)
        ticket.resumed = {choice.choice: choice for choice in submit.resumed}
        if (known := self.models.get(submit.model)) is not None:
            self.learn(known)
        try:
            check_submit(self, ticket, self._clock())
        except RequestError as error:
            self._delivery.rejected(ticket, error)
            return
        deadline = submit.arrival + (submit.slo.ttft if self.rules.by_deadline else FAR)
        model = self.models[ticket.model]
        ticket.queue_position, ticket.estimated_seconds = estimate(self, model, deadline, submit.tenant)
        self._note_return(model)
        if model.is_active and not submit.resumed:
            ticket.is_hopeful = is_hopeful(waiting_request(self, ticket).seconds, submit.slo.ttft)
        self.requests.add(ticket)
        self._needs_admission = True
        self.residency.want(model)

    def _note_return(self, model: Model) -> None:
        """If the model was idle, for how long tells when it may come back another time."""
        if model.last_used and not self.requests.has_any(model.name):
            model.idle_times.add(self._clock() - model.last_used)

    def learn(self, model: Model) -> None:
        """What the model's directory tells, as soon as anybody asks for it."""
        self.residency.learn(model)
        if model.profile is not None:
            self.costs.learn(model.name, model.profile)

    def on_cancel(self, gateway: GatewayId, cancel: CancelChoice) -> None:
        """A client has gone, or a stop string ended a choice."""
        ticket = self.requests.get(RequestId(cancel.request_id))
        if ticket is None or ticket.submit.attempt != cancel.attempt or ticket.gateway != gateway:
            return
        if cancel.choice is None:
            self._endings.end(ticket)
        else:
            self._endings.drop_choice(ticket, cancel.choice)

    def on_gateway_ended(self, gateway: GatewayId) -> None:
        """Nobody waits for its answers any more."""
        for ticket in self.requests.of_gateway(gateway):
            self._endings.end(ticket)

    def on_packed(self, model: str) -> None:
        """The agent holds a model's packed weights, which it was asked for."""
        self._arrivals.packed(self.models[model])

    def on_held(self, model: str, size: Bytes) -> None:
        """The agent holds a model's packed weights, whoever asked for them."""
        home = self.models[model].config.device
        self._arrivals.held(self.models[model], size, may_live_here=home in (None, index_of(self.name)))

    def on_packing_failed(self, model: str, reason: str) -> None:
        """The checkpoint is unusable."""
        self._arrivals.packing_failed(self.models[model], reason)

    def on_job(self, event: JobEvent) -> None:
        """Something that ran beside the loop has ended."""
        self._arrivals.job_ended(event)
        self.memory_changed()

    def on_command(self, command: Activate | Evict | SetLimits) -> None:
        """The controller decides; commands of an earlier controller are void."""
        if command.epoch >= self.epoch:
            self.epoch = Epoch(command.epoch)
            carry_out(self, command)

    def on_abandon(self, command: Abandon) -> None:
        """The controller does not wait any more for what it has commanded."""
        if command.epoch >= self.epoch:
            abandon(self, command)

    def on_homes(self, homes: Homes) -> None:
        """Which models live here, as the controller tells at each change."""
        if homes.epoch >= self.epoch:
            self._spare_room.on_homes(homes.models)
            self._look_for_crowded_out()

    def command_done(
        self,
        command: Command,
        error: str | None = None,
        *,
        conflicts: bool = False,
        pinned: Model | None = None,
    ) -> None:
        """Tell the controller how a command ended, and whom a model that may be `pinned` leaves no room."""
        self._outbox.to_controller(
            CommandDone(
                command_id=command.command_id,
                worker=self.name,
                error=error,
                conflicts=conflicts,
                without_room=[] if pinned is None else self.room.crowded_out_by(pinned),
            )
        )

    # --- work -----------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Do what can be done now; whether there is more to do at once."""
        now = self._clock()
        self._stepper.collect()
        self.watch.passed("commits")
        self.host.tend(self.models)
        self._arrivals.look(now)
        self.watch.passed("models and KV that move")
        self._admit(now)
        self.watch.passed("admission")
        has_more = self._stepper.step(now)
        self.watch.steps_passed()
        if has_more or self.is_device_busy:
            self._standstill.ended(now)
        else:
            end_standstill(self, self._standstill, self._endings, now)
        return self.device.backend.work_aside(ASIDE_SECONDS, urgent_only=has_more) or has_more

    @property
    def is_device_busy(self) -> bool:
        """Work is queued whose end will not be told: it has to be looked for."""
        return any([lane.flights for lane in self.device.all_lanes])  # noqa: C419  (quicker for so few)

    def next_timer(self) -> float | None:
        """The time at which `advance` must be called even if nothing comes in."""
        now = self._clock()
        times = []
        if len(self.requests):
            times += [self.requests.next_expiry, self.requests.latest_end]
        if len(self.requests) > self.requests.num_waiting:
            times.append(now + STANDSTILL_SECONDS)
        times += [model.stalled_until for model in self.models.values() if model.stalled_until > now]
        times += self._arrivals.next_looks(self._patience, now)
        return min(times, default=None)

    def _admit(self, now: float) -> None:
        self._endings.look_for_overdue(now)
        if not self._needs_admission and self.requests.next_expiry > now:
            return
        self._needs_admission = False
        self.accounts.look(self.models)
        if not self.requests.num_waiting:
            self.owed_to_late = 0.0
            return
        decisions, self.owed_to_late = admission.decide(admission_snapshot(self), now)
        for decision in decisions:
            waiting = self.requests.get(decision.request_id)
            assert waiting is not None
            match decision:
                case admission.Admit(is_late=is_late):
                    if is_late:
                        waiting.found_late(now)
                    self._enter(waiting)
                case admission.Expire():
                    self._endings.expired(waiting)
                case _:
                    assert_never(decision)

    def _enter(self, ticket: Ticket) -> None:
        engine = self.models[ticket.model].engine
        assert engine is not None
        submit = ticket.submit
        self.requests.enter(ticket)
        self.models[ticket.model].stalled_until = 0.0
        engine.add(
            EngineRequest(
                request_id=ticket.request_id,
                prompt=submit.prompt,
                params=submit.params,
                arrival=submit.arrival,
                resumed=tuple(ticket.resumed.values()),
            )
        )

    # --- what others tell -----------------------------------------------------------------------------

    def request_completed(self, ticket: Ticket) -> None:
        """Its last token has been drawn and will be sent."""
        self._rate.completed(self._clock())
        self._endings.end(ticket)

    def step_made(self, model: Model, step: Step) -> None:
        """It is charged to those whose requests are in it."""
        self.accounts.step_made(model.name, step)

    def prompts_computed(self) -> None:
        """Engines hold fewer prompts than before, so others may enter."""
        self.places_changed()

    def places_changed(self) -> None:
        """Somebody may enter an engine who could not before."""
        self._needs_admission = True

    def memory_changed(self) -> None:
        """What could not run for want of memory is worth another look."""
        self._needs_admission = True
        self.reclaimer.memory_changed()
        self._spare_room.changed()
        for model in self.models.values():
            model.stalled_until = 0.0

    def evict(self, model: Model) -> None:
        """Take an active model off the device."""
        self._stepper.drain(model)
        self.residency.evict(model, self.reclaimer, self)
        self.memory_changed()

    def return_requests(self, model: Model) -> None:
        """Hand back whatever waits for a model that goes elsewhere."""
        self._endings.give_back(model)

    def capacities_changed(self) -> None:
        """Limits are others: longest contexts follow."""
        for model in self.models.values():
            capacity = self.max_len(model)
            if capacity is None:
                continue
            self._endings.capacity_changed(model, capacity)
            if model.engine is not None:
                model.engine.limit_context(capacity)

    def room_changed(self) -> None:
        """A model stays that did not, or does not any more, or keeps another part of the memory."""
        self.capacities_changed()
        for model in self.models.values():
            if model.state is ModelState.FAILED and model.lacks_room:
                model.retry_at = 0.0
                self._learn_room(model)
        self._look_for_crowded_out()

    def _look_for_crowded_out(self) -> None:
        """Beside pinned models those that live here learn at once whether there is room for them."""
        if any(model.pinned for model in self.models.values()):
            for model in self.models.values():
                if model.is_at_home and model.state is ModelState.COLD:
                    self._learn_room(model)

    def _learn_room(self, model: Model) -> None:
        self.learn(model)
        if model.state is ModelState.FAILED:
            self._endings.model_failed(model)

    def requests_suspended(self, choices: dict[RequestId, list[ResumedChoice]]) -> None:
        """An eviction took these requests' place: they wait again, with what they had produced."""
        for request_id, unfinished in choices.items():
            ticket = self.requests.get(request_id)
            assert ticket is not None
            self.requests.leave(ticket)
            for choice in unfinished:
                ticket.resumed[choice.choice] = choice

    def check(self) -> None:
        """Conservation: every slab and every block has exactly one state and one owner, every request too."""
        self.device.pool.check()
        self.requests.check()
        self.host.check()
        for model in self.models.values():
            assert model.weight_slabs in ((), model.arena_slabs), f"{model.name}: slabs that no arena shows"
            if model.kv is not None:
                model.kv.check()
                if model.engine is not None:
                    model.engine.scheduler.check()
                assert set(model.kv.slabs) == set(self.device.pool.owned(KvOwner(model.name))), model.name

    def queue_seconds(self, model: Model) -> float:
        """Estimated time until a request that comes now would start.

        What the waiting ones cost, or how long they take at the recent rate of ends, whichever is longer.
        """
        by_rate = self._rate.seconds_for(self.requests.num_waiting + 1, self._clock())
        return min(MOST_SECONDS, max(by_rate, estimate(self, model, float("inf")).seconds))

    def max_len(self, model: Model) -> int | None:
        """Longest context of a model on this device, in tokens."""
        if model.profile is None:
            return None
        return min(model.profile.spec.max_position, self.room.capacity_tokens(model))


def index_of(worker: str) -> int:
    """Place of a worker's device in the configuration."""
    return int(worker.removeprefix("worker-"))


def _new_models(config: Config, worker: WorkerId, slab_bytes: Bytes) -> dict[str, Model]:
    """Cold. Those for which there is no other device are wanted; else the controller says who loads."""
    return {
        each.name: Model(
            config=each,
            kv_floor=slabs_up(each.memory.floor, slab_bytes),
            kv_limit=limit_slabs(each.memory.limit, slab_bytes),
            pinned=each.pinned,
            is_wanted=each.is_loaded_at_start
            and (len(config.devices) == 1 or each.device == index_of(worker)),
        )
        for each in config.models
    }
