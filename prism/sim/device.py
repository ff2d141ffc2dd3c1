"""One simulated device: its events, in the order of the virtual clock; mirrors `worker/loop.py`.

    steps and loads that have ended -> arrivals -> models in and out -> admission -> the lanes' next steps

Nothing depends on how often this is run, only on what has changed: that is why many steps may be taken at
once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import assert_never

from prism.modes import Rules
from prism.sim.jobs import End, Job, Served
from prism.sim.loader import Loader
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.stepper import Stepper
from prism.sim.ticks import to_seconds, to_ticks
from prism.sim.views import admission_snapshot, expiry, waiting_request
from prism.types import ModelId, ModelState, RequestId
from prism.worker import admission
from prism.worker.snapshot import WaitingRequest


class SimDevice:
    """Requests come in by `offer`; `run_until` moves the clock."""

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
        self._rules = rules
        self._limits = limits
        self.models: dict[ModelId, SimModel] = {}
        for index, one in enumerate(served):
            model = SimModel(one, limits.slab_bytes, lane=index % limits.num_lanes)
            model.kv_limit = None if shares is None else shares[one.model]
            self.models[one.model] = model
        models = list(self.models.values())
        self.memory = Memory(
            num_slabs,
            models,
            self,
            min_residency=limits.min_residency,
            idle_threshold=limits.idle_threshold,
        )
        self.loader = Loader(self.models, self.memory, rules, limits, self)
        self.stepper = Stepper(models, self.memory, rules, limits, together, self)
        self.now = 0
        self._arrivals: deque[Job] = deque()
        self._expiries: list[tuple[int, RequestId, Job]] = []
        self._lives: deque[Job] = deque()
        """All that have come, in order of arrival, for the end of their lives."""
        self._waiting: dict[Job, WaitingRequest] = {}
        """Not admitted."""
        self._life = to_ticks(limits.request_timeout)
        self._owed_to_late = 0.0
        self._needs_admission = False
        self._needs_moves = False
        self.num_events = 0

    def offer(self, job: Job) -> None:
        """A request that will come; in order of arrival."""
        self._arrivals.append(job)

    def next_event(self) -> int:
        """When something happens next."""
        times = [self.stepper.next_end(), self.loader.link.next_event(), self.loader.wake_at]
        if self._arrivals:
            times.append(self._arrivals[0].arrival)
        while self._expiries and not self._can_expire(self._expiries[0][2]):
            heappop(self._expiries)
        if self._expiries:
            times.append(self._expiries[0][0])
        while self._lives and self._lives[0].end is not None:
            self._lives.popleft()
        if self._lives:
            times.append(self._lives[0].arrival + self._life)
        return min(times)

    def _can_expire(self, job: Job) -> bool:
        return job in self._waiting and not job.is_started

    def run_until(self, end: int) -> None:
        """Do what happens before `end`."""
        last = -1
        while (time := self.next_event()) < end:
            assert time > last, "the clock stands still"
            last = time
            self._process(time)

    def _process(self, now: int) -> None:
        self.now = now
        self.num_events += 1
        self.stepper.sync(now)
        self.stepper.collect(now)
        if self.loader.arrived(now):
            self._needs_admission = True
        if self.loader.wake_at <= now:
            self.memory_changed()
        while self._arrivals and self._arrivals[0].arrival <= now:
            self._arrive(self._arrivals.popleft())
        while self._lives and self._lives[0].arrival + self._life <= now:
            self._time_out(self._lives.popleft(), now)
        if self._expiries and self._expiries[0][0] <= now:
            self._needs_admission = True
        self._decide(now)
        while self._needs_moves or self._needs_admission:  # a step has taken memory from others
            self._decide(now)

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

    def _arrive(self, job: Job) -> None:
        model = self.models[job.model]
        slabs = model.kv_limit or self.memory.num_slabs - self._slabs_of_weights(model)
        if job.prompt + job.output > model.capacity(slabs):
            job.finish(End.TOO_LONG, self.now)
            return
        if not model.tickets and model.num_activations:
            model.idle_times.add(to_seconds(self.now - model.last_used))
        model.tickets[job.request_id] = job
        self._wait(job, model)
        self._lives.append(job)
        self._needs_moves = self._needs_admission = True

    def _wait(self, job: Job, model: SimModel) -> None:
        """It has come, or has lost its place."""
        self._waiting[job] = waiting_request(job, model, self._rules, self._limits)
        if not job.is_started:
            heappush(self._expiries, (expiry(job, self._limits), job.request_id, job))

    def _slabs_of_weights(self, model: SimModel) -> int:
        """Those that the model can never use for KV, and what its neighbours need at the least."""
        if not self._rules.is_resident:
            return model.weight_slabs
        return sum(m.weight_slabs + (m is not model) for m in self.models.values())

    def _admit(self, now: int) -> None:
        if not self._waiting:
            return
        snapshot = admission_snapshot(
            self._waiting,
            self.models,
            self.memory,
            self.loader.link,
            self._rules,
            self._limits,
            now,
            self._owed_to_late,
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
                    self.models[job.model].admit(job)
                    self.stepper.disturb(self.models[job.model], now)
                case admission.Expire():
                    self._end(job, End.EXPIRED, now)
                case _:
                    assert_never(decision)

    def _time_out(self, job: Job, now: int) -> None:
        if job.end is not None:
            return
        model = self.models[job.model]
        if self._waiting.pop(job, None) is None:
            model.cancel(job)
            self.stepper.disturb(model, now)
        self._end(job, End.TIMED_OUT, now)

    def _end(self, job: Job, end: End, now: int) -> None:
        model = self.models[job.model]
        job.finish(end, now)
        del model.tickets[job.request_id]
        model.last_used = now
        self.memory.trim(model)
        self.memory_changed()

    # --- what others tell -------------------------------------------------------------------------------

    def drawn(self, job: Job, now: int) -> None:
        """See `Listener.drawn`."""
        job.last_token = now
        if job.first_token is None:
            job.first_token = now

    def completed(self, job: Job, now: int) -> None:
        """See `Listener.completed`."""
        job.produced = job.output
        self.models[job.model].output_lengths.add(job.output)
        job.last_token = now
        self._end(job, End.SERVED, now)

    def prompts_ran(self) -> None:
        """See `Listener.prompts_ran`."""
        self._needs_admission = True

    def evict(self, model: SimModel) -> None:
        """See `Owner.evict`."""
        self.stepper.remove(model, self.now)
        for job in model.suspend():
            job.is_admitted = False
            if job.first_token is not None:
                job.last_token = max(job.last_token, model.last_end)
            self._wait(job, model)
        self.memory.release(model)
        model.state = ModelState.COLD
        model.num_evictions += 1
        self.memory_changed()

    def cancel_load(self, model: SimModel) -> None:
        """See `Owner.cancel_load`."""
        self.loader.cancel(model)
        self.memory_changed()

    def disturb(self, model: SimModel) -> None:
        """See `Owner.disturb`."""
        self.stepper.disturb(model, self.now)

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
        tickets = sum(len(model.tickets) for model in self.models.values())
        assert tickets == len(self._waiting) + sum(m.num_sequences for m in self.models.values())
