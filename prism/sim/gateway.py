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
        for worker in workers:
            self._routing.worker_up(Placement(worker, Incarnation(1)))

    def update(self, version: int, routes: list[Route]) -> None:
        """The routing table has changed."""
        self._routing.update(Routes(epoch=1, version=version, routes=routes))

    def on_report(self, report: Report) -> None:
        """A worker's latest state."""
        self._routing.report(report)

    def route(self, job: Job) -> WorkerId:
        """Where it is sent now."""
        candidates = self._routing.candidates(ModelId(job.model))
        chosen = (
            candidates[0].placement if len(candidates) == 1 else choose(candidates, [int(job.request_id)])
        )
        assert chosen is not None
        self._routing.sent(chosen)
        return chosen.worker
