"""What the controller knows: the workers' last reports, and where each model lives. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism.messages import ModelReport, Report, Route
from prism.types import ModelId, WorkerId


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What placement must know of a configured model."""

    model: ModelId
    weights_bytes: int
    worker: WorkerId | None = None
    """Where the configuration wants it."""


@dataclass(frozen=True, slots=True)
class DeviceSize:
    """What placement must know of a device."""

    worker: WorkerId
    memory_bytes: int
    slab_bytes: int = 1


@dataclass(slots=True)
class ControllerState:
    """Rebuilt from the workers' reports by every new controller."""

    epoch: int
    homes: dict[ModelId, WorkerId]
    reports: dict[WorkerId, Report] = field(default_factory=dict)
    version: int = 0

    def routes(self) -> list[Route]:
        """The whole routing table."""
        return [Route(model=model, workers=[worker]) for model, worker in self.homes.items()]

    def on_report(self, report: Report) -> None:
        """A worker's state; an earlier incarnation's is void."""
        known = self.reports.get(WorkerId(report.worker))
        if known is None or report.incarnation >= known.incarnation:
            self.reports[WorkerId(report.worker)] = report

    def on_worker_ended(self, worker: WorkerId) -> None:
        """Nothing is known of it until its next incarnation reports."""
        self.reports.pop(worker, None)

    def model_report(self, model: ModelId) -> ModelReport | None:
        """What the model's worker says of it."""
        report = self.reports.get(self.homes[model])
        if report is None:
            return None
        return next((m for m in report.models if m.model == model), None)
