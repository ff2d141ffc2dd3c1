"""Carries out what `worker/reclaim.py` decides, on counts of slabs; mirrors `worker/reclaimer.py`."""

from __future__ import annotations

from typing import Protocol, assert_never

from prism.sim.model import SimModel
from prism.sim.ticks import to_seconds
from prism.types import ModelId, ModelState
from prism.worker import reclaim
from prism.worker.snapshot import Holding, MemorySnapshot, Need


class Owner(Protocol):
    """What becomes of those who give memory up."""

    def evict(self, model: SimModel) -> None:
        """Take an active model off the device."""
        ...

    def cancel_load(self, model: SimModel) -> None:
        """Call a load off."""
        ...

    def disturb(self, model: SimModel) -> None:
        """What was planned for the model's next steps may not hold any more."""
        ...

    def memory_changed(self) -> None:
        """Who lacked memory may have it now."""
        ...


class Memory:
    """The slabs of one device."""

    def __init__(self, num_slabs: int, owner: Owner, min_residency: float) -> None:
        self.num_slabs = num_slabs
        self.free = num_slabs
        self._models: dict[ModelId, SimModel] = {}
        self._owner = owner
        self._min_residency = min_residency

    def add(self, model: SimModel) -> None:
        """A model that may come."""
        self._models[model.name] = model

    # --- getting memory -------------------------------------------------------------------------------

    def ensure_kv(self, model: SimModel, num_blocks: int, now: int) -> None:
        """Raise a model's free blocks to `num_blocks`, as far as memory and rank allow."""
        per_slab = model.layout.blocks_per_slab
        while (lacking := num_blocks - model.free_blocks) > 0:
            missing = -(-lacking // per_slab)
            spare = self.free - self._reserved(model)
            room = missing if model.kv_limit is None else model.kv_limit - model.kv_slabs
            count = min(missing, room, spare)
            if count > 0:
                self.free -= count
                model.kv_slabs += count
                continue
            need = Need(model.name, max(1, missing - spare), arrival_of(model), for_weights=False)
            if not self._give(need, now):
                return

    def ensure_weights(self, model: SimModel, now: int) -> bool:
        """Whether the model's activation has what it takes, after asking others for it."""
        wanted = slabs_to_activate(model) + self._reserved(model)
        while (missing := wanted - self.free) > 0:
            need = Need(model.name, missing, arrival_of(model), for_weights=True)
            if not self._give(need, now):
                return False
        return True

    def activate(self, model: SimModel) -> None:
        """Take what an activation takes."""
        self.free -= slabs_to_activate(model)
        assert self.free >= 0
        model.kv_slabs = slabs_to_activate(model) - model.weight_slabs

    def release(self, model: SimModel) -> None:
        """All of a model's slabs come back."""
        assert not model.used_blocks
        self.free += model.weight_slabs + model.kv_slabs
        model.kv_slabs = 0

    def trim(self, model: SimModel) -> None:
        """Give back empty slabs: all but one of a busy model, all of an idle one."""
        if model.kv_limit is not None:
            return  # its share is its own
        spare = model.empty_slabs - (1 if model.num_sequences else 0)
        if spare > 0:
            model.kv_slabs -= spare
            self.free += spare

    def _reserved(self, model: SimModel) -> int:
        """Slabs for which older requests of models without weights are waiting."""
        waiting = [m for m in self._models.values() if m.state is ModelState.FETCHING and m is not model]
        if not waiting:
            return 0
        rank = (arrival_of(model), model.name)
        return sum(slabs_to_activate(m) for m in waiting if (arrival_of(m), m.name) < rank)

    def _give(self, need: Need, now: int) -> bool:
        """One reclaim step; whether asking again makes sense at once."""
        decision = reclaim.decide(self._snapshot(), need, to_seconds(now))
        match decision:
            case None | reclaim.AwaitRetirement():
                return False
            case reclaim.TakeEmpty(model=name, slabs=slabs):
                self._take_empty(name, slabs)
            case reclaim.PreemptYoungest(model=name):
                victim = self._models[name]
                youngest = victim.youngest_running()
                assert youngest is not None
                victim.preempt(youngest)
                self._owner.disturb(victim)
            case reclaim.CancelLoad(model=name):
                self._owner.cancel_load(self._models[name])
            case reclaim.EvictModel(model=name):
                self._owner.evict(self._models[name])
            case reclaim.DropOwnCache() | reclaim.DropCache():
                raise AssertionError("there are no caches to drop")
            case _:
                assert_never(decision)
        return True

    def _take_empty(self, name: ModelId, slabs: int) -> None:
        victim = self._models[name]
        victim.kv_slabs -= slabs
        self.free += slabs
        self._owner.disturb(victim)

    # --- what the policy sees -------------------------------------------------------------------------

    def _snapshot(self) -> MemorySnapshot:
        models = self._models.values()
        loading = [m.name for m in models if m.state is ModelState.LOADING and not (m.tickets or m.is_wanted)]
        holdings = tuple(_holding(m) for m in models if m.state in (ModelState.LOADING, ModelState.ACTIVE))
        return MemorySnapshot(0, holdings, tuple(loading), self._min_residency)

    def obtainable(self, model: SimModel) -> int:
        """Slabs that a model could still get without touching a running sequence, within its limit."""
        slabs = self.free
        for other in self._models.values():
            if other is model or not other.is_active:
                continue
            if not other.tickets and not other.is_pinned:
                slabs += other.weight_slabs + other.kv_slabs
            elif other.kv_limit is None:
                slabs += other.empty_slabs
        if model.kv_limit is not None:
            slabs = min(slabs, model.kv_limit - model.kv_slabs)
        return slabs

    def check(self) -> None:
        """Every slab has one owner, and nobody uses more than it holds."""
        held = 0
        for model in self._models.values():
            assert 0 <= model.used_blocks <= model.kv_slabs * model.layout.blocks_per_slab, model.name
            has_weights = model.state in (ModelState.LOADING, ModelState.ACTIVE)
            assert has_weights or not model.kv_slabs
            held += model.kv_slabs + (model.weight_slabs if has_weights else 0)
        assert self.free >= 0 and held + self.free == self.num_slabs


def arrival_of(model: SimModel) -> float:
    """Arrival of the model's oldest request: its rank. Without one it comes behind all."""
    oldest = model.oldest()
    return float("inf") if oldest is None else to_seconds(oldest.arrival)


def slabs_to_activate(model: SimModel) -> int:
    """What a model takes when it is loaded: its weights, and its share or one slab of KV."""
    return model.weight_slabs + max(1, model.kv_limit or 0)


def _holding(model: SimModel) -> Holding:
    costs = model.served.costs.shape
    youngest = model.youngest_running()
    oldest = model.oldest()
    shares = model.kv_limit is not None
    return Holding(
        model=model.name,
        is_active=model.is_active,
        is_pinned=model.is_pinned,
        kv_slabs=model.kv_slabs,
        kv_floor=model.kv_slabs if shares else 0,
        kv_limit=model.kv_limit,
        empty_slabs=model.empty_slabs,
        gatherable_slabs=model.empty_slabs,
        num_cached_blocks=0,
        recompute_cost=2 * costs.num_parameters / costs.kv_bytes_per_token,
        last_used=to_seconds(model.last_used),
        active_since=to_seconds(model.active_since),
        is_idle=not model.tickets,
        oldest_request=None if oldest is None else to_seconds(oldest.arrival),
        youngest_running=None if youngest is None else to_seconds(youngest.arrival),
    )
