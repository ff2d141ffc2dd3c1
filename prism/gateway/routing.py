"""Which worker gets a request; pure.

The controller says which workers may serve a model, the agent which are alive, and the workers how they
fare. Each of them may be away for a while: what was heard last goes on to count.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

from prism.gateway.requests import Placement
from prism.messages import ModelReport, Report, Route, Routes
from prism.types import Incarnation, ModelId, ModelState, WorkerId

LOAD_STEP = 8
"""Loads that differ by less are equal: then the prompt's beginning decides, for the prefix cache."""
PREFIX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that may serve a model."""

    placement: Placement
    is_active: bool
    """The model is in device memory there."""
    load: float
    """Requests there, by the share that it bears: what its report says, and what was sent from here since."""
    is_draining: bool = False
    """It finishes what it has: the model has moved away."""
    is_silent: bool = False
    """It has not reported for long."""


def choose(candidates: tuple[Candidate, ...], prompt: list[int]) -> Placement | None:
    """The worker for a prompt, or None if there is none.

    1. One that reports.
    2. One that the model has not moved away from.
    3. One that has the model in memory.
    4. The least loaded, in steps of `LOAD_STEP`.
    5. The one to which the first tokens of the prompt are bound by hash (rendezvous).
    """
    prefix = ",".join(map(str, prompt[:PREFIX_TOKENS]))
    best = min(
        candidates,
        key=lambda c: (
            c.is_silent,
            c.is_draining,
            not c.is_active,
            c.load // LOAD_STEP,
            _affinity(prefix, c.placement.worker),
        ),
        default=None,
    )
    return None if best is None else best.placement


def _affinity(prefix: str, worker: WorkerId) -> bytes:
    return blake2b(f"{worker}/{prefix}".encode(), digest_size=8).digest()


class Routing:
    """The table, who is up, and the latest reports."""

    def __init__(self) -> None:
        self._version = (-1, -1)
        self._routes: dict[ModelId, Route] = {}
        self._up: dict[WorkerId, Incarnation] = {}
        self._reports: dict[WorkerId, dict[ModelId, ModelReport]] = {}
        self._sent: dict[WorkerId, int] = {}
        self._silent: list[str] = []

    @property
    def is_usable(self) -> bool:
        """A table has come and a worker is up."""
        return self._version >= (0, 0) and bool(self._up)

    @property
    def workers(self) -> dict[WorkerId, Incarnation]:
        """All workers that are up."""
        return dict(self._up)

    @property
    def silent(self) -> list[WorkerId]:
        """Those of them that have not reported to the controller for long."""
        return [worker for worker in sorted(self._up) if worker in self._silent]

    def update(self, routes: Routes) -> bool:
        """Take a newer table; False for one that is not newer."""
        version = (routes.epoch, routes.version)
        if version <= self._version:
            return False
        self._version = version
        self._routes = {ModelId(route.model): route for route in routes.routes}
        self._silent = routes.silent
        return True

    def worker_up(self, placement: Placement) -> None:
        """A worker can be sent requests."""
        self._up[placement.worker] = placement.incarnation

    def worker_ended(self, placement: Placement) -> None:
        """It cannot any more; what it reported is void."""
        if self._up.get(placement.worker) == placement.incarnation:
            del self._up[placement.worker]
            self._reports.pop(placement.worker, None)
            self._sent.pop(placement.worker, None)

    def report(self, report: Report) -> None:
        """A worker's latest state."""
        worker = WorkerId(report.worker)
        if self._up.get(worker) == report.incarnation:
            self._reports[worker] = {ModelId(model.model): model for model in report.models}
            self._sent[worker] = 0

    def max_len(self, model: ModelId) -> int | None:
        """Tokens of the longest context for which each of a model's workers has memory, as far as known."""
        workers = self._routes[model].workers if model in self._routes else []
        reports = [self._reports.get(WorkerId(name), {}).get(model) for name in workers]
        known = [report.max_len for report in reports if report is not None and report.max_len is not None]
        return min(known, default=None)

    def sent(self, placement: Placement) -> None:
        """A request is on its way there; the next report will count it."""
        self._sent[placement.worker] = self._sent.get(placement.worker, 0) + 1

    def candidates(self, model: ModelId) -> tuple[Candidate, ...]:
        """The workers that are routed and up."""
        route = self._routes.get(model)
        if route is None:
            return ()
        weights = route.weights or [1.0] * len(route.workers)
        found = [
            self._candidate(model, w, weight, False) for w, weight in zip(route.workers, weights, strict=True)
        ]
        found += [self._candidate(model, worker, 1.0, True) for worker in route.draining]
        return tuple(candidate for candidate in found if candidate is not None)

    def _candidate(self, model: ModelId, name: str, weight: float, is_draining: bool) -> Candidate | None:
        worker = WorkerId(name)
        if (incarnation := self._up.get(worker)) is None:
            return None
        reports = self._reports.get(worker, {})
        load = sum(each.num_running + each.num_waiting for each in reports.values())
        is_active = model in reports and reports[model].state is ModelState.ACTIVE
        load += self._sent.get(worker, 0)
        is_silent = worker in self._silent
        return Candidate(Placement(worker, incarnation), is_active, load / weight, is_draining, is_silent)
