"""One simulated device: its events, in the order of the virtual clock; mirrors `worker/loop.py`.

    steps and loads that have ended -> arrivals -> models in and out -> admission -> the lanes' next steps

Nothing depends on how often this is run, only on what has changed: that is why many steps may be taken at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from prism.modes import Rules
from prism.sim.jobs import End, Job, Served
from prism.sim.loader import Loader
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.stepper import Stepper
from prism.sim.ticks import NEVER, to_seconds, to_ticks
from prism.sim.timers import Timers
from prism.sim.views import admission_snapshot, waiting_request
from prism.types import ModelId, ModelState
from prism.worker import admission
from prism.worker.snapshot import WaitingRequest


class SimDevice:
    """Requests come in by `offer`; `run_until` moves the clock; `commands.py` is for a controller."""

    def __init__(
        self,
        served: Sequence[Served],
        num_slabs: int,
        rules: Rules,
        limits: Limits,
        together: Callable[[int], float],
        shares: dict[ModelId, int] | None = None,
    ) -> None:
        """`shares` are slabs of KV, where models have fixed ones. `together` is the profile's overlap."""
        self.slab_bytes = limits.slab_bytes
        self._rules = rules
        self._limits = limits
        self.models: dict[ModelId, SimModel] = {}
        self.memory = Memory(num_slabs, self, limits)
        self.stepper = Stepper(self.memory, rules, limits, together, self)
        for one in served:
            self.learn(one, None if shares is None else shares[one.model]).is_at_home = True
        self.loader = Loader(self.models, self.memory, rules, limits, self)
        self.now = 0
        self._waiting: dict[Job, WaitingRequest] = {}
        """Not admitted."""
        self._timers = Timers(limits, self._waiting)
        self._poke = 0 if served and limits.load_ahead else NEVER
        """When something has been done to it from outside."""
        self._quiet_until = 0
        """Nothing happens before, unless something is done to it from outside."""
        self._owed_to_late = 0.0
        self._needs_admission = False
        self._needs_moves = self._poke == 0
        self.num_events = 0

    def learn(self, served: Served, share: int | None = None) -> SimModel:
        """A model that may come here."""
        model = self.models.get(served.model)
        if model is None:
            model = self.models[served.model] = SimModel(served, self._limits.slab_bytes)
            model.kv_limit = share
            self.memory.add(model)
        return model

    def offer(self, job: Job) -> None:
        """A request that will come; in order of arrival."""
        self._timers.offer(job)
        self._quiet_until = min(self._quiet_until, job.arrival)

    def next_event(self) -> int:
        """When something happens next."""
        return self._next_of_others(min(self.stepper.next_close(), self.stepper.next_coming()))

    def _next_of_others(self, before: int) -> int:
        """But steps and what comes of them; `before` if nothing comes before that."""
        loader = self.loader
        time = loader.wake_at if loader.wake_at < before else before
        if self._poke < time:
            time = self._poke
        if loader.link.is_busy:
            time = min(time, loader.link.next_event())
        return self._timers.next(time)

    def run_until(self, end: int) -> None:
        """Do what happens before `end`."""
        if end <= self._quiet_until:
            return
        last, stepper = -1, self.stepper
        while True:
            close, coming = stepper.next_close(), stepper.next_coming()
            steps = close if close < coming else coming
            others = self._next_of_others(steps + 1)
            time = self._quiet_until = min(others, steps)
            if time >= end:
                return
            assert time > last, "the clock stands still"
            last = time
            if others == time:
                self._process(time, is_more_than_steps=True)
            elif close < coming:
                self._go_on(time)
            elif close == time or self._waiting or not stepper.skip_prompts(time):
                self._process(time, is_more_than_steps=False)

    def _go_on(self, now: int) -> None:
        self.now = now
        if self.stepper.go_on(now):
            self.num_events += 1
        else:
            self._process(now, is_more_than_steps=False)

    def begin(self, now: int) -> None:
        """Move the clock, and tell what has run by then."""
        self.now = now
        self._quiet_until = now
        self.stepper.sync(now)
        self.stepper.collect(now)

    def poke(self) -> None:
        """Something was done to it just now, from outside: let it decide anew."""
        self._poke = self.now
        self._needs_admission = self._needs_moves = True

    def _process(self, now: int, *, is_more_than_steps: bool) -> None:
        """Steps that close or end requests, and what is due besides."""
        self._poke = NEVER
        self.num_events += 1
        self.begin(now)
        if is_more_than_steps:
            if self.loader.arrived(now):
                self._needs_admission = self._needs_moves = True
            if self.loader.wake_at <= now:
                self.memory_changed()
            if self._timers.next(now + 1) <= now:
                self._timers_ran(now)
        self._decide(now)
        while self._needs_moves or self._needs_admission:  # a step has taken memory from others
            self._decide(now)

    def _timers_ran(self, now: int) -> None:
        while (job := self._timers.arrived(now)) is not None:
            self.arrive(job)
        while (job := self._timers.outlived(now)) is not None:
            self._time_out(job, now)
        if self._timers.has_expired(now):
            self._needs_admission = True

    def _decide(self, now: int) -> None:
        if self._needs_moves:
            self._needs_moves = False
            self.loader.move(now)
        if self._needs_admission:
            self._needs_admission = False
            self._admit(now)
        self.stepper.plan(now)
        if self.stepper.has_stalled:
            self.loader.stalled(now)

    # --- requests ---------------------------------------------------------------------------------------

    def arrive(self, job: Job) -> None:
        """A request is here, perhaps from another device."""
        model = self.models[job.model]
        if job.prompt + job.output > model.capacity(self.loader.most_kv(model)):
            job.finish(End.TOO_LONG, self.now)
            return
        if not model.tickets and model.last_used:
            model.idle_times.add(to_seconds(self.now - model.last_used))
        job.is_hopeful = model.is_hopeful(job)
        model.take(job)
        self._wait(job, model)
        self._timers.came(job)
        self._needs_moves = self._needs_admission = True

    def _wait(self, job: Job, model: SimModel) -> None:
        """It has come, or has lost its place."""
        self._waiting[job] = waiting_request(job, model, self._rules, self._limits)
        self._timers.waits(job)

    def _admit(self, now: int) -> None:
        if not self._waiting:
            return
        link, rules, limits = self.loader.link, self._rules, self._limits
        snapshot = admission_snapshot(
            self._waiting, self.models, self.memory, link, rules, limits, now, self._owed_to_late
        )
        result = admission.decide(snapshot, to_seconds(now))
        self._owed_to_late = result.owed_to_late
        by_id = {job.request_id: job for job in self._waiting} if result.decisions else {}
        for decision in result.decisions:
            job = by_id[decision.request_id]
            del self._waiting[job]
            match decision:
                case admission.Admit(is_late=is_late):
                    job.is_admitted, job.is_late = True, job.is_late or is_late
                    if is_late and job.first_token is None:
                        job.due = now + to_ticks(self.models[job.model].served.slo.ttft)
                    self.models[job.model].admit(job)
                    self.stepper.disturb(self.models[job.model], now)
                case admission.Expire():
                    self.models[job.model].first_token(job, now)
                    self._end(job, End.EXPIRED, now)
                case _:
                    assert_never(decision)

    def _time_out(self, job: Job, now: int) -> None:
        if job.produced < job.output and job.request_id in self.models[job.model].tickets:
            self.withdraw(job)
            self._end(job, End.TIMED_OUT, now)

    def withdraw(self, job: Job) -> None:
        """It waits and runs here no more."""
        if self._waiting.pop(job, None) is None:
            model = self.models[job.model]
            model.cancel(job)
            self.stepper.disturb(model, self.now)

    def _end(self, job: Job, end: End, now: int) -> None:
        model = self.models[job.model]
        job.finish(end, now)
        del model.tickets[job.request_id]
        model.last_used = now
        self.memory.trim(model)
        self.memory_changed()

    # --- what others tell -------------------------------------------------------------------------------

    def drawn(self, job: Job, end: int) -> None:
        """See `Listener.drawn`."""
        job.last_token = end
        if job.first_token is None:
            job.first_token = end
            self.models[job.model].first_token(job, end)

    def completed(self, job: Job, end: int) -> None:
        """See `Listener.completed`."""
        job.produced = job.output
        self.models[job.model].output_lengths.add(job.output)
        job.last_token = end
        self._end(job, End.SERVED, end)

    def prompts_ran(self) -> None:
        """See `Listener.prompts_ran`."""
        self._needs_admission = True

    def bind(self, model: SimModel) -> None:
        """See `loader.Device`."""
        self.stepper.lanes.bind(model)

    def evict(self, model: SimModel) -> None:
        """See `loader.Device`, `memory.Owner`."""
        self.stepper.remove(model, self.now)
        for job in model.suspend():
            job.is_admitted = False
            if job.first_token is not None:
                job.last_token = max(job.last_token, model.last_end)
            self._wait(job, model)
        self.memory.release(model)
        model.state = ModelState.COLD
        model.is_wanted = model.is_ahead = False
        model.num_evictions += 1
        self.memory_changed()

    def cancel_load(self, model: SimModel) -> None:
        """See `Owner.cancel_load`."""
        self.loader.cancel(model)
        self.memory_changed()

    def disturb(self, model: SimModel) -> None:
        """See `Owner.disturb`."""
        self.stepper.disturb(model, self.now)

    def stop_growing(self, model: SimModel | None = None) -> None:
        """See `Owner.stop_growing`."""
        self.stepper.stop_growing(model, self.now)

    def has_shrunk(self, model: SimModel) -> None:
        """See `Owner.has_shrunk`."""
        self.stepper.has_shrunk(model, self.now)

    def memory_changed(self) -> None:
        """See `Owner.memory_changed`."""
        self._needs_admission = self._needs_moves = True
        self.stepper.wake(self.now)

    def check(self) -> None:
        """Conservation of slabs and of requests."""
        self.memory.check()
        for model in self.models.values():
            admitted = sum(job.is_admitted for job in model.tickets.values())
            assert admitted == model.num_sequences, model.name
            assert model.free_blocks >= 0, model.name
        tickets = sum(len(model.tickets) for model in self.models.values())
        assert tickets == len(self._waiting) + sum(m.num_sequences for m in self.models.values())
