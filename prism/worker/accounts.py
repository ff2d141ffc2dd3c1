"""What each tenant has of this device: its part of every step, and so who is over its share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prism.engine.step import Step
from prism.messages import TenantReport
from prism.types import ModelId, Tenant
from prism.worker.cost_book import CostBook, chunk_seconds
from prism.worker.models import Model
from prism.worker.requests import Requests
from prism.worker.shares import Shares, TenantName


@dataclass(slots=True)
class TenantUsage:
    """Counters of one tenant; they only grow."""

    prompt_tokens: int = 0
    """Computed: without what the prefix cache had, and again with what was lost."""
    decoded_tokens: int = 0
    device_seconds: float = 0.0
    """By the cost model."""


class Accounts:
    """Those of the configured tenants. Without API keys there are none, and nothing is counted."""

    def __init__(self, tenants: Sequence[Tenant], requests: Requests, costs: CostBook) -> None:
        self.tenants = {tenant.name: tenant for tenant in tenants}
        self.usage: dict[str | None, TenantUsage] = {name: TenantUsage() for name in self.tenants}
        self.over_share: frozenset[TenantName] = frozenset()
        """Whose requests come behind the others'."""
        self._requests = requests
        self._costs = costs
        self._shares = Shares()

    def step_made(self, model: ModelId, step: Step) -> None:
        """Charge a step to those whose it is, before it has run: the next decision knows of it."""
        costs = self._costs.of(model)
        if not self.usage or costs is None:
            return
        for chunk, seconds in zip(step.chunks, chunk_seconds(costs, step), strict=True):
            ticket = self._requests.get(chunk.sequence.request_id)
            if ticket is None:
                continue
            submit = ticket.submit
            self._shares.charge(submit.tenant, submit.weight, seconds)
            if (usage := self.usage.get(submit.tenant)) is not None:
                usage.device_seconds += seconds
                usage.decoded_tokens += chunk.samples
                usage.prompt_tokens += chunk.length if chunk.length > 1 else 0

    def look(self, models: Mapping[str, Model]) -> None:
        """Before each decision: who waits, and who is over its share."""
        if len(self.usage) < 2:
            return
        able = {model.name for model in models.values() if model.takes_requests}
        waiting = {t.submit.tenant for t in self._requests.waiting if t.model in able}
        self._shares.wait(waiting)
        is_shared = len(waiting) > 1
        self.over_share = self._shares.over(self._pending(models.values())) if is_shared else frozenset()

    def over_beside(self, tenant: TenantName, models: Mapping[str, Model]) -> frozenset[TenantName]:
        """Who would be over its share if this tenant waited, too."""
        if len(self.usage) < 2 or tenant is None:
            return frozenset()
        return self._shares.over(self._pending(models.values()), tenant)

    def report(self) -> list[TenantReport]:
        """All of them, in the order of the configuration."""
        if not self.tenants:
            return []
        running = Counter(t.submit.tenant for t in self._requests if t.is_running)
        waiting = Counter(t.submit.tenant for t in self._requests.waiting)
        return [
            TenantReport(
                tenant=name,
                weight=tenant.weight,
                num_running=running[name],
                num_waiting=waiting[name],
                prompt_tokens=(usage := self.usage[name]).prompt_tokens,
                decoded_tokens=usage.decoded_tokens,
                device_seconds=usage.device_seconds,
            )
            for name, tenant in self.tenants.items()
        ]

    def _pending(self, models: Iterable[Model]) -> dict[TenantName, float]:
        """Prompts that engines hold: without them a tenant could fill the engines before it is charged."""
        pending: dict[TenantName, float] = {}
        for model in models:
            costs, engine = self._costs.of(model.name), model.engine
            if costs is None or engine is None:
                continue
            for sequence in (*engine.scheduler.prompts, *engine.scheduler.waiting):
                ticket = self._requests.get(sequence.request_id)
                if sequence.num_missing > 1 and ticket is not None:
                    tenant, weight = ticket.submit.tenant, ticket.submit.weight
                    seconds = costs.steps.prefill(sequence.num_missing, sequence.num_computed)
                    pending[tenant] = pending.get(tenant, 0.0) + seconds / weight
        return pending
