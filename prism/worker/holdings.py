"""What `reclaim.py` decides on: everybody's memory as values, and what it would cost to have it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prism.memory.pool import SlabPool
from prism.types import LAST_RANK, ModelId, Rank
from prism.worker.ahead import Cached
from prism.worker.cost_book import CostBook
from prism.worker.foresight import reuse_chance
from prism.worker.host_kv import HostKv
from prism.worker.models import Model
from prism.worker.reclaim import patience
from prism.worker.requests import Requests
from prism.worker.snapshot import Holding, MemorySnapshot, Running


class Holdings:
    """Takes the snapshots of one device's memory."""

    def __init__(
        self,
        pool: SlabPool,
        models: Mapping[str, Model],
        requests: Requests,
        host: HostKv,
        costs: CostBook,
        *,
        min_residency: float,
        max_wait: float,
        idle_threshold: float | None,
    ) -> None:
        """Without an `idle_threshold` models are kept by how they came back before."""
        self._pool = pool
        self._models = models
        self._requests = requests
        self._host = host
        self._costs = costs
        self._min_residency = min_residency
        self._max_wait = max_wait
        self._idle_threshold = idle_threshold

    def rank(self, model: Model) -> Rank:
        """Of the model's oldest request; commands and preloads come behind all requests."""
        return self._requests.oldest(model.name) or LAST_RANK

    def is_asked_for(self, model: Model) -> bool:
        """By a request, a command or the configuration."""
        return model.is_wanted or self._requests.has_any(model.name)

    def may_displace(self, model: Model, now: float) -> bool:
        """Others may be stopped so that this model can be loaded."""
        oldest, costs = self._requests.oldest(model.name), self._costs.of(model.name)
        if oldest is None or costs is None:
            return True
        return now - oldest[0] >= patience(costs.activation, self._max_wait)

    def return_chance(self, model: Model, now: float) -> float:
        """That a model without requests gets one soon."""
        return model.idle_times.return_chance(max(0.0, now - model.last_used), self._idle_threshold)

    def reuse_chance(self, model: Model, now: float) -> float:
        """That the cached block which a model would drop first is used again soon."""
        assert model.kv is not None
        age = model.use_times.age(model.kv.oldest_use, now)
        return reuse_chance(age) * model.cache_hits.share

    def caches(self, now: float) -> dict[ModelId, Cached]:
        """What the active models' prefix caches could give above their floors, without moving anything."""
        found = {}
        for model in self._models.values():
            if model.kv is None or not model.is_settled:
                continue
            kv = model.kv
            slabs = min(kv.num_slabs - model.kv_floor, kv.num_unused_slabs) - kv.num_empty_slabs
            if slabs > 0:
                block = self._host.block_seconds(model.name) * self.reuse_chance(model, now)
                found[model.name] = Cached(slabs, block * kv.layout.blocks_per_slab)
        return found

    def load_seconds(self, model: Model) -> float:
        """Of an activation; 0 while nothing is known of it."""
        costs = self._costs.of(model.name)
        return 0.0 if costs is None else costs.activation

    def snapshot(self, expected_demand: float, now: float) -> MemorySnapshot:
        """All holdings."""
        coming, unwanted = 0, []
        for model in self._models.values():
            if model.load is not None and model.load.is_cancelled:
                coming += len(model.weight_slabs) + (0 if model.kv is None else model.kv.num_slabs)
            elif model.load is not None and not self.is_asked_for(model):
                unwanted.append(model.name)
        return MemorySnapshot(
            num_retiring=self._pool.num_retiring + coming,
            unwanted_loads=tuple(unwanted),
            holdings=tuple(self._holding(m, now) for m in self._models.values() if m.kv is not None),
            min_residency=self._min_residency,
            expected_demand=expected_demand,
        )

    def _holding(self, model: Model, now: float) -> Holding:
        kv = model.kv
        assert kv is not None
        block_seconds = self._host.block_seconds(model.name)
        return Holding(
            model=model.name,
            is_active=model.is_settled,
            is_pinned=model.pinned,
            kv_slabs=kv.num_slabs,
            kv_floor=model.kv_floor,
            kv_limit=model.kv_limit,
            blocks_per_slab=kv.layout.blocks_per_slab,
            empty_slabs=kv.num_empty_slabs,
            gatherable_slabs=kv.num_gatherable,
            num_free_blocks=kv.num_free,
            num_cached_blocks=kv.num_cached,
            block_seconds=block_seconds,
            reuse_chance=self.reuse_chance(model, now),
            weight_slabs=len(model.weight_slabs),
            load_seconds=self.load_seconds(model),
            return_chance=self.return_chance(model, now),
            active_since=model.active_since,
            oldest_request=self._requests.oldest(model.name),
            running=tuple(self._running(model, block_seconds, now)),
        )

    def _running(self, model: Model, block_seconds: float, now: float) -> Iterator[Running]:
        if model.engine is None:
            return
        for sequence in model.engine.scheduler.running:
            ticket = self._requests.get(sequence.request_id)
            blocks = len(sequence.blocks)
            slack = 0.0 if ticket is None else ticket.due - now
            yield Running(sequence.rank, blocks, blocks * block_seconds, slack)
