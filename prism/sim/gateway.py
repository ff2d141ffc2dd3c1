"""Which device gets a request, by the gateway's own code."""

from __future__ import annotations

from collections.abc import Iterable

from prism.gateway.requests import Placement
from prism.gateway.routing import Routing, choose
from prism.messages import Report, Route, Routes
from prism.sim.jobs import Job
from prism.types import Incarnation, ModelId, WorkerId


class Gateway:
    """One gateway, which hears of everything at once. Without prefix caches each prompt is another."""

    def __init__(self, workers: Iterable[WorkerId]) -> None:
        self._routing = Routing()
        self._only: dict[ModelId, Placement] = {}
        """Of models with one home and nothing that moves: that is no choice."""
        for worker in workers:
            self._routing.worker_up(Placement(worker, Incarnation(1)))

    def update(self, version: int, routes: list[Route]) -> None:
        """The routing table has changed."""
        self._routing.update(Routes(epoch=1, version=version, routes=routes))
        self._only = {
            ModelId(route.model): Placement(WorkerId(route.workers[0]), Incarnation(1))
            for route in routes
            if len(route.workers) == 1 and not route.draining
        }

    def on_report(self, report: Report) -> None:
        """A worker's latest state."""
        self._routing.report(report)

    def route(self, job: Job) -> WorkerId:
        """Where it is sent now."""
        chosen = self._only.get(job.model)
        if chosen is None:
            chosen = choose(self._routing.candidates(job.model), [int(job.request_id)])
        assert chosen is not None
        self._routing.sent(chosen)
        return chosen.worker
