"""Owns every live request: one method per event, no waiting, no clock of its own.

A request is in exactly one place: held (no worker yet, or its worker died) or placed. Whatever happens,
its sink hears `ended` once, and nothing after that.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import assert_never

from prism.errors import Overloaded, RequestError, Unavailable, WireError
from prism.gateway.ports import Links, Sink
from prism.gateway.recovery import (
    RESUBMIT_BURST,
    RESUBMIT_RATE,
    Quarantine,
    Throughput,
    TokenBucket,
)
from prism.gateway.requests import Accepted, Failed, Finished, Gap, Placement, Request, Stale
from prism.gateway.routing import Routing, choose
from prism.gateway.timers import Timers
from prism.messages import (
    CancelChoice,
    Demand,
    Output,
    Outputs,
    Rejected,
    Report,
    Returned,
    Routes,
    Started,
    Token,
)
from prism.tenants import has_room
from prism.types import ModelId, RequestId, Tenant, TenantId

log = logging.getLogger(__name__)

START_MARGIN = 1.0
"""The worker, which can compute a better Retry-After, gets this long to refuse a late request first."""
CANCELLED = WireError(status=499, type="cancelled", message="the client went away", code="cancelled")


class Dispatcher:
    """All live requests of this gateway."""

    def __init__(self, links: Links, max_held: int) -> None:
        self.routing = Routing()
        self._links = links
        self._max_held = max_held
        self._live: dict[RequestId, tuple[Request, Sink]] = {}
        self._held: dict[RequestId, Request] = {}
        self._timers = Timers()
        self._demanded: set[ModelId] = set()
        self._bucket = TokenBucket(RESUBMIT_BURST, RESUBMIT_RATE)
        self._throughput = Throughput()
        self._quarantine = Quarantine()

    def __len__(self) -> int:
        return len(self._live)

    def num_held(self) -> Counter[ModelId]:
        """Requests without a worker, by model."""
        return Counter(request.model for request in self._held.values())

    def num_held_by_tenant(self) -> Counter[TenantId]:
        """The same by tenant."""
        return Counter(request.tenant.name for request in self._held.values() if request.tenant is not None)

    # --- clients --------------------------------------------------------------------------------------

    def refuse(self, model: ModelId, tenant: Tenant | None, now: float) -> None:
        """Raise the error with which a request for the model would be refused at this moment, if any."""
        if seconds := self._quarantine.seconds_left(model, now):
            raise _quarantined(model, seconds)
        if len(self._held) >= self._max_held and not self._has_room_for(tenant):
            wait = self._throughput.retry_after(len(self._live), now)
            raise Overloaded(f"{self._max_held} requests wait already", retry_after=wait)

    def late(self, now: float) -> Overloaded:
        """The error of a request that has waited for as long as it may."""
        wait = self._throughput.retry_after(len(self._live), now)
        return Overloaded("no first token within limits.max_wait", retry_after=wait)

    def _has_room_for(self, tenant: Tenant | None) -> bool:
        if tenant is None:
            return False
        num_own = self.num_held_by_tenant()[tenant.name]
        return has_room(self._max_held, len(self._held), num_own, tenant.part)

    def open(self, request: Request, sink: Sink, now: float) -> None:
        """Take a new request; from here on it ends exactly once."""
        assert request.request_id not in self._live
        self.refuse(request.model, request.tenant, now)
        self._live[request.request_id] = (request, sink)
        self._held[request.request_id] = request
        self._timers.set(request.latest_start + START_MARGIN, request.request_id)
        self._timers.set(request.latest_end, request.request_id)
        self._place(request, now)

    def cancel(self, request_id: RequestId, now: float) -> None:
        """Its client has gone; a request that has ended is no error."""
        if request_id in self._live:
            self._fail(self._live[request_id][0], CANCELLED, now)

    def fail_all(self, error: RequestError, now: float) -> None:
        """The gateway stops."""
        for request, _ in tuple(self._live.values()):
            self._fail(request, error.wire(), now)

    # --- controller and agent -------------------------------------------------------------------------

    def on_routes(self, routes: Routes, now: float) -> None:
        """A routing table."""
        if self.routing.update(routes):
            self._place_held(now)

    def on_controller_up(self, now: float) -> None:
        """A new controller knows nothing of what was demanded."""
        self._demanded.clear()
        self._place_held(now)

    def on_worker_up(self, placement: Placement, now: float) -> None:
        """A worker can be sent requests; an earlier incarnation of it has ended, said or not."""
        earlier = self.routing.workers.get(placement.worker)
        if earlier is not None and earlier != placement.incarnation:
            self.on_worker_ended(Placement(placement.worker, earlier), now)
        self.routing.worker_up(placement)
        self._place_held(now)

    def on_worker_ended(self, placement: Placement, now: float) -> None:
        """Everything that was there is held again, or fails."""
        self.routing.worker_ended(placement)
        self._demanded.clear()
        for request, _ in tuple(self._live.values()):
            if request.placement == placement:
                self._lose(request, is_death=True, now=now)
        self._place_held(now)

    # --- workers --------------------------------------------------------------------------------------

    def on_report(self, report: Report) -> None:
        """A worker's state."""
        self.routing.report(report)

    def on_started(self, placement: Placement, started: Started, now: float) -> None:
        """A request runs."""
        live = self._live.get(RequestId(started.request_id))
        if live is not None and live[0].start(placement, started.attempt):
            live[1].started(started, now)

    def on_rejected(self, placement: Placement, rejected: Rejected, now: float) -> None:
        """A worker gave a request up."""
        live = self._live.get(RequestId(rejected.request_id))
        if live is not None and live[0].is_from_here(placement, rejected.attempt):
            live[0].fail(rejected.error)
            self._close(live[0], now)

    def on_returned(self, placement: Placement, returned: Returned, now: float) -> None:
        """A worker hands a request back, since its model has moved: it goes on elsewhere with its tokens."""
        live = self._live.get(RequestId(returned.request_id))
        if live is not None and live[0].is_from_here(placement, returned.attempt):
            live[0].hand_back()
            self._hold(*live)
            self._place_held(now)

    def on_outputs(self, placement: Placement, outputs: Outputs, now: float) -> None:
        """The tokens of one step."""
        for token in outputs.tokens:
            live = self._live.get(RequestId(token.request_id))
            if live is None:
                continue
            request, sink = live
            if not request.goes_on(placement, token):
                self._on_output(request, sink, placement, _output(token), now)
            elif sink.token(token.choice, token.token, now) is not None:
                self._stop(request, placement, token.choice, now)
        for output in outputs.items:
            live = self._live.get(RequestId(output.request_id))
            if live is not None:
                self._on_output(*live, placement, output, now)

    def _on_output(
        self, request: Request, sink: Sink, placement: Placement, output: Output, now: float
    ) -> None:
        match request.accept(placement, output):
            case Stale():
                return
            case Gap(reason):
                log.error("tokens lost: %s", reason, extra={"request_id": request.request_id})
                self._links.to_worker(
                    placement, CancelChoice(request_id=request.request_id, attempt=request.attempt)
                )
                self._lose(request, is_death=False, now=now)
                self._place_held(now)
            case Accepted() as accepted:
                self._deliver(request, sink, placement, accepted, now)
            case never:
                assert_never(never)

    def _deliver(
        self, request: Request, sink: Sink, placement: Placement, accepted: Accepted, now: float
    ) -> None:
        finish = sink.tokens(accepted, now)
        if finish is None:
            return
        if accepted.finish is None:
            self._stop(request, placement, accepted.choice, now)
        else:
            self._finish_choice(request, accepted.choice, now)

    def _stop(self, request: Request, placement: Placement, choice: int, now: float) -> None:
        """A stop string has ended a choice: its worker does not know."""
        cancel = CancelChoice(request_id=request.request_id, attempt=request.attempt, choice=choice)
        self._links.to_worker(placement, cancel)
        self._finish_choice(request, choice, now)

    def _finish_choice(self, request: Request, choice: int, now: float) -> None:
        request.finish_choice(choice)
        if request.ending is not None:
            self._close(request, now)

    # --- time -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> float | None:
        """End what is late, send what may be sent; the time of the next tick."""
        for request_id in self._timers.due(now):
            if request_id in self._live:
                self._expire(self._live[request_id][0], now)
        self._place_held(now)
        self._timers.forget(self._live, len(self._live))
        until = self._timers.next_time()
        if any(self._is_rated(request) for request in self._held.values()):
            resubmit = self._bucket.next_time(now)
            return resubmit if until is None else min(until, resubmit)
        return until

    def _is_rated(self, request: Request) -> bool:
        """It only waits for the rate limit."""
        return request.attempt > 0 and bool(self.routing.candidates(request.model))

    def _expire(self, request: Request, now: float) -> None:
        if request.latest_end <= now:
            error: RequestError = Unavailable("the request took longer than limits.request_timeout")
        elif request.latest_start + START_MARGIN <= now and not request.has_tokens and not request.is_running:
            error = self.late(now)
        else:
            return
        self._fail(request, error.wire(), now)

    # --- placing, losing, ending ------------------------------------------------------------------------

    def _place_held(self, now: float) -> None:
        """Send what can be sent: new requests at once, later attempts at a bounded rate, by slack."""
        for request in sorted(self._held.values(), key=lambda r: (r.deadline, r.arrival, r.request_id)):
            self._place(request, now)

    def _place(self, request: Request, now: float) -> None:
        """1. No usable route: ask the controller for one, once. 2. Later attempts wait for the rate limit.

        The controller is asked again when a worker has died or it is a new one, and never because of a table
        that still has no route: that would go back and forth without end.
        """
        candidates = self.routing.candidates(request.model)
        placement = choose(candidates, request.prompt)
        if placement is None:  # 1
            if request.model not in self._demanded:
                self._demanded.add(request.model)
                self._links.to_controller(Demand(model=request.model))
            return
        if request.attempt > 0 and not self._bucket.take(now):  # 2
            return
        del self._held[request.request_id]
        self._demanded.discard(request.model)
        self.routing.sent(placement)
        self._links.to_worker(placement, request.submit_to(placement))

    def _lose(self, request: Request, *, is_death: bool, now: float) -> None:
        killed_alone = request.lose()
        if request.ending is not None:
            self._close(request, now)
        else:
            self._hold(request, self._live[request.request_id][1])
        if is_death and killed_alone and self._quarantine.killed(request.model, now):
            log.error("model quarantined: its requests kill workers", extra={"model": request.model})
            self._fail_held(request.model, now)

    def _hold(self, request: Request, sink: Sink) -> None:
        self._held[request.request_id] = request
        self._timers.set(request.latest_start + START_MARGIN, request.request_id)
        sink.resubmitted()

    def _fail_held(self, model: ModelId, now: float) -> None:
        error = _quarantined(model, self._quarantine.seconds_left(model, now))
        for request in tuple(self._held.values()):
            if request.model == model:
                self._fail(request, error.wire(), now)

    def _fail(self, request: Request, error: WireError, now: float) -> None:
        placement, attempt = request.placement, request.attempt
        request.fail(error)
        if placement is not None:
            self._links.to_worker(placement, CancelChoice(request_id=request.request_id, attempt=attempt))
        self._close(request, now)

    def _close(self, request: Request, now: float) -> None:
        assert isinstance(request.ending, Finished | Failed)
        self._held.pop(request.request_id, None)
        _, sink = self._live.pop(request.request_id)
        self._throughput.ended(now)
        sink.ended(request.ending, now)

    def check(self) -> None:
        """Each live request is unended, and either held or placed with a worker that is up."""
        up = self.routing.workers
        for request_id, (request, _) in self._live.items():
            assert request.ending is None, request_id
            assert (request_id in self._held) == (request.placement is None), request_id
            if request.placement is not None:
                assert up.get(request.placement.worker) == request.placement.incarnation, request_id
        assert self._held.keys() <= self._live.keys()


def _output(token: Token) -> Output:
    return Output(
        request_id=token.request_id,
        attempt=token.attempt,
        choice=token.choice,
        index=token.index,
        token_ids=[token.token],
    )


def _quarantined(model: ModelId, seconds: float) -> Unavailable:
    text = f"model {model!r} is quarantined: its requests keep killing workers"
    return Unavailable(text, param="model", retry_after=max(1.0, seconds))
