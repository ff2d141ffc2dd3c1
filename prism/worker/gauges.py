"""Keeps a worker's Prometheus metrics up to date."""

from __future__ import annotations

from prometheus_client import Counter

from prism.memory.slabs import KvOwner, LaneOwner, WeightsOwner
from prism.messages import TenantReport
from prism.metrics import Metrics
from prism.worker.cost_book import CostBook
from prism.worker.loop import Worker
from prism.worker.models import Model

Place = tuple[str, str]
"""(owner, model)"""


class Gauges:
    """Gauges are set from the worker's state at each report; counters grow by what was added since."""

    def __init__(self, metrics: Metrics, worker_name: str) -> None:
        self._metrics = metrics
        self._worker_name = worker_name
        self._places: set[Place] = set()
        self._counted: dict[tuple[str, str], float] = {}

    def update(self, worker: Worker) -> None:
        """Set everything."""
        self._slabs(worker)
        graphs = worker.device.backend.graph_usage
        self._metrics.graphs.labels(self._worker_name).set(graphs.num_graphs)
        self._metrics.graph_bytes.labels(self._worker_name).set(graphs.num_bytes)
        self._metrics.unaccounted_bytes.labels(self._worker_name).set(worker.memory.unaccounted)
        for model in worker.models.values():
            tickets = worker.requests.of_model(model.name)
            running = sum(ticket.is_running for ticket in tickets)
            self._metrics.num_requests_running.labels(model.name).set(running)
            self._metrics.num_requests_waiting.labels(model.name).set(len(tickets) - running)
            kv = model.kv
            share = 0.0
            if kv is not None and (total := kv.num_slabs * kv.layout.blocks_per_slab):
                share = kv.num_used / total
            self._metrics.kv_cache_usage_perc.labels(model.name).set(share)
            self._metrics.kv_host_bytes.labels(model.name).set(worker.host.blocks.bytes_of(model.name))
            self._count(model)
            self._steps(model, worker.costs)
            self._alone(model, worker.costs)
            saved, fetched = worker.host.counts(model.name)
            self._grow(
                (self._metrics.kv_blocks_saved, "saved", saved),
                (self._metrics.kv_blocks_fetched, "fetched", fetched),
                labels=(model.name,),
            )
        for report in worker.accounts.report():
            self._tenant(report)
        stalls = worker.watch.stalls
        self._grow(
            (self._metrics.loop_stalls, "stalls", stalls.num_stalls),
            (self._metrics.loop_stall_seconds, "stall seconds", stalls.seconds),
            labels=(self._worker_name,),
        )

    def _tenant(self, report: TenantReport) -> None:
        metrics, name = self._metrics, report.tenant
        metrics.tenant_requests_running.labels(name).set(report.num_running)
        metrics.tenant_requests_waiting.labels(name).set(report.num_waiting)
        self._grow(
            (metrics.tenant_prompt_tokens, "tenant's prompts", report.prompt_tokens),
            (metrics.tenant_generation_tokens, "tenant's tokens", report.decoded_tokens),
            (metrics.tenant_device_seconds, "tenant's seconds", report.device_seconds),
            labels=(name,),
        )

    def _count(self, model: Model) -> None:
        """Add to the counters what has come since the last time."""
        metrics, name = self._metrics, model.name
        if self._added(name, "activations", model.num_activations):
            metrics.activations.labels(name).inc()
            metrics.activation_seconds.labels(name).observe(model.load_seconds)
        metrics.evictions.labels(name).inc(self._added(name, "evictions", model.num_evictions))
        if model.engine is not None:
            scheduler = model.engine.scheduler
            self._grow(
                (metrics.num_preemptions, "preemptions", scheduler.num_preemptions),
                (metrics.prefix_cache_queries, "queries", scheduler.num_prefix_queries),
                (metrics.prefix_cache_hits, "hits", scheduler.num_prefix_hits),
                labels=(name,),
            )

    def _steps(self, model: Model, costs: CostBook) -> None:
        metrics, name = self._metrics, model.name
        for kind, steps in costs.steps(name).items():
            self._grow(
                (metrics.steps, f"{kind} steps", steps.num_steps),
                (metrics.step_tokens, f"{kind} step tokens", steps.num_tokens),
                (metrics.step_seconds, f"{kind} step seconds", steps.seconds),
                (metrics.step_predicted_seconds, f"{kind} step predicted", steps.predicted),
                labels=(name, kind),
            )

    def _alone(self, model: Model, costs: CostBook) -> None:
        metrics, name, alone = self._metrics, model.name, costs.alone(model.name)
        if alone is None:
            return
        for kind, work in alone.kinds.items():
            self._grow(
                (metrics.work_alone, f"{kind} alone", work.count),
                (metrics.work_alone_seconds, f"{kind} alone seconds", work.seconds),
                (metrics.work_alone_predicted_seconds, f"{kind} alone predicted", work.predicted),
                labels=(name, kind, alone.costs),
            )

    def _grow(self, *counts: tuple[Counter, str, float], labels: tuple[str, ...]) -> None:
        """Add to counters with these labels, whose first one says whose they are, what has come since."""
        for counter, name, count in counts:
            counter.labels(*labels).inc(self._added(labels[0], name, count))

    def _added(self, whose: str, name: str, count: float) -> float:
        added = count - self._counted.get((whose, name), 0)
        self._counted[whose, name] = count
        return added

    def _slabs(self, worker: Worker) -> None:
        pool = worker.device.pool
        counts: dict[Place, int] = {("free", ""): pool.num_free, ("retiring", ""): pool.num_retiring}
        for owner, count in pool.owners().items():
            match owner:
                case KvOwner(model=model):
                    counts["kv", model] = count
                case WeightsOwner(model=model):
                    counts["weights", model] = count
                case LaneOwner():
                    counts["workspace", ""] = count
        for place in self._places | set(counts):
            self._metrics.slabs.labels(*place, self._worker_name).set(counts.get(place, 0))
        self._places |= set(counts)
