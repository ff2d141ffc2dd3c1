"""The gateway as a whole, without HTTP: what the endpoints and the links share, its timers and its end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import assert_never

from prism.clock import Clock
from prism.config import Config
from prism.errors import Overloaded, Unavailable
from prism.gateway.dispatcher import Dispatcher
from prism.gateway.links import WorkerMessage
from prism.gateway.ports import Links, Sink
from prism.gateway.requests import Placement, Request
from prism.gateway.threads import Pool
from prism.gateway.tokenizers import TextModels
from prism.messages import Outputs, Rejected, Report, Returned, Routes, Started, WeightsFailed, WeightsHeld
from prism.metrics import Metrics
from prism.tenants import has_room
from prism.types import ModelId, Tenant, TenantId

log = logging.getLogger(__name__)

NUM_THREADS = 4
"""Render and tokenise."""


class Gateway:
    """One gateway process. Everything but the threads that read and tokenise happens on one event loop."""

    def __init__(self, config: Config, links: Links, clock: Clock, metrics: Metrics) -> None:
        self.config = config
        self.clock = clock
        self.metrics = metrics
        self.threads = Pool(NUM_THREADS)
        self.text_models = TextModels(config)
        self.dispatcher = Dispatcher(links, config.limits.max_queue)
        self._unpackable: dict[ModelId, str] = {}
        self._num_http = 0
        self._arriving: Counter[TenantId | None] = Counter()
        self._stop_by: float | None = None
        self._stop_changed = asyncio.Event()
        self._wake = asyncio.Event()

    @property
    def is_stopping(self) -> bool:
        """No new requests are taken."""
        return self._stop_by is not None

    @property
    def is_ready(self) -> bool:
        """Requests can be served: routes are known and a worker is up."""
        return self.dispatcher.routing.is_usable and not self.is_stopping

    @property
    def status(self) -> str:
        """In one word; `degraded` serves, but not everything."""
        if not self.is_ready:
            return "stopping" if self.is_stopping else "starting"
        return "degraded" if self.dispatcher.routing.silent else "ok"

    def max_len(self, name: ModelId) -> int | None:
        """Tokens of a model's longest context, within the memory that it may use as well; None if unknown."""
        bounds = self.text_models.max_len(name), self.dispatcher.routing.max_len(name)
        return min((bound for bound in bounds if bound is not None), default=None)

    @property
    def unavailable_models(self) -> dict[ModelId, str]:
        """Those whose directory cannot be used, and why, as far as is known."""
        found = {name: self.text_models.failure(name) for name in self.text_models.names}
        return {
            name: reason
            for name, failure in found.items()
            if (reason := failure or self._unpackable.get(name)) is not None
        }

    # --- HTTP requests ----------------------------------------------------------------------------------

    @contextmanager
    def http_request(self) -> Iterator[None]:
        """Counts a request from its head to the last byte of its answer."""
        if self.is_stopping:
            raise Unavailable("the server is shutting down", retry_after=5)
        self._num_http += 1
        try:
            yield
        finally:
            self.http_ended()

    @contextmanager
    def arriving(self, tenant: Tenant | None) -> Iterator[None]:
        """Bounds how many requests are read and tokenised at a time."""
        name, part = (None, 0.0) if tenant is None else (tenant.name, tenant.part)
        num_arriving = self._arriving.total()
        if not has_room(self.config.limits.max_queue, num_arriving, self._arriving[name], part):
            raise Overloaded(f"{num_arriving} requests arrive already", retry_after=1)
        self._arriving[name] += 1
        try:
            yield
        finally:
            self._arriving[name] -= 1

    def http_begun(self) -> None:
        """A stream outlives its handler."""
        self._num_http += 1

    def http_ended(self) -> None:
        """One less to wait for."""
        self._num_http -= 1
        self._stop_changed.set()

    def open(self, request: Request, sink: Sink) -> None:
        """Take a request; its sink hears its end."""
        self.dispatcher.open(request, sink, self.clock.now())
        self._wake.set()  # it may be the next to time out

    def cancel(self, request: Request) -> None:
        """Its client has gone."""
        self.dispatcher.cancel(request.request_id, self.clock.now())

    # --- other processes --------------------------------------------------------------------------------

    def on_worker_up(self, placement: Placement) -> None:
        """A worker listens."""
        self.dispatcher.on_worker_up(placement, self.clock.now())
        self._wake.set()

    def on_worker_ended(self, placement: Placement) -> None:
        """A worker has ended."""
        self.dispatcher.on_worker_ended(placement, self.clock.now())
        self._wake.set()

    def on_packing(self, news: WeightsFailed | WeightsHeld) -> None:
        """Requests for a model whose weights could not be packed go on being sent: it is tried again."""
        match news:
            case WeightsFailed(model=model, reason=reason):
                self._unpackable[ModelId(model)] = reason
            case WeightsHeld(model=model):
                self._unpackable.pop(ModelId(model), None)
            case _:
                assert_never(news)

    def on_controller_up(self) -> None:
        """A new controller."""
        self.dispatcher.on_controller_up(self.clock.now())

    def on_routes(self, routes: Routes) -> None:
        """A routing table."""
        self.dispatcher.on_routes(routes, self.clock.now())
        self._wake.set()

    def on_worker_message(self, placement: Placement, message: WorkerMessage) -> None:
        """What a worker says."""
        now = self.clock.now()
        match message:
            case Outputs():
                self.dispatcher.on_outputs(placement, message, now)
            case Started():
                self.dispatcher.on_started(placement, message, now)
            case Rejected():
                self.dispatcher.on_rejected(placement, message, now)
            case Returned():
                self.dispatcher.on_returned(placement, message, now)
            case Report():
                self.dispatcher.on_report(message)
            case _:
                assert_never(message)

    # --- time -------------------------------------------------------------------------------------------

    async def run_timers(self) -> None:
        """End what is late and send what may be sent, until cancelled."""
        while True:
            self._wake.clear()
            until = self.dispatcher.tick(self.clock.now())
            held = self.dispatcher.num_held()
            for name in self.text_models.names:
                self.metrics.num_requests_waiting.labels(name).set(held[name])
            held_by = self.dispatcher.num_held_by_tenant()
            for tenant in self.config.server.tenants:
                self.metrics.tenant_requests_waiting.labels(tenant.name).set(held_by[tenant.name])
            await self.clock.wait(self._wake, until)

    def begin_stop(self, grace: float) -> None:
        """Refuse new requests; running ones have `grace` seconds. A second call can only shorten them."""
        until = self.clock.now() + grace
        self._stop_by = until if self._stop_by is None else min(self._stop_by, until)
        log.info("stopping, %d requests run", self._num_http)
        self._stop_changed.set()

    async def stopped(self) -> None:
        """Return when `begin_stop` was called and all requests have ended, in good time or not."""
        while self._stop_by is None or (self._num_http and self.clock.now() < self._stop_by):
            self._stop_changed.clear()
            await self.clock.wait(self._stop_changed, self._stop_by)
        self.dispatcher.fail_all(Unavailable("the server is shutting down", retry_after=5), self.clock.now())

    def close(self) -> None:
        """The threads end once they are idle."""
        self.text_models.close()
        self.threads.close()
