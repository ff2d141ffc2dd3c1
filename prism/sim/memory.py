"""Carries out what `worker/reclaim.py` decides, on counts of slabs; mirrors `worker/reclaimer.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, assert_never

from prism.engine.scheduler import Want
from prism.sim.jobs import policy_rank
from prism.sim.model import SimModel
from prism.sim.modes import Limits
from prism.sim.ticks import NEVER, first_after, to_seconds
from prism.types import LAST_RANK, ModelId, ModelState, Rank
from prism.worker import reclaim
from prism.worker.foresight import RecentDemand
from prism.worker.growth import ask_in_order, take_or_need
from prism.worker.kv_costs import compute_seconds
from prism.worker.reclaim import patience
from prism.worker.snapshot import Holding, MemorySnapshot, Need, Running


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

    def stop_growing(self, model: SimModel | None = None) -> None:
        """What was promised to runs, or to that of one model, may not hold any more: they take nothing."""
        ...

    def has_shrunk(self, model: SimModel) -> None:
        """A model has fewer free blocks than a run of its may have counted on."""
        ...


class Memory:
    """The slabs of one device."""

    def __init__(self, num_slabs: int, owner: Owner, limits: Limits) -> None:
        self.num_slabs = num_slabs
        self.free = num_slabs
        self.promised = 0
        """Of the free slabs, those that runs are going to take on their way."""
        self._models: dict[ModelId, SimModel] = {}
        self._owner = owner
        self._limits = limits
        self._demand = RecentDemand()
        self._blocked: set[ModelId] = set()
        """Models whose weights wait until older requests of others end."""

    def add(self, model: SimModel) -> None:
        """A model that may come."""
        self._models[model.name] = model

    # --- getting memory -------------------------------------------------------------------------------

    def ensure_kv(self, model: SimModel, wants: Sequence[Want], now: int) -> None:
        """Free blocks for what a model's sequences want, as far as memory and their ranks allow."""
        ask_in_order(wants, lambda num_blocks, want: self._raise(model, num_blocks, want, now))

    def take_free(self, model: SimModel, num_blocks: int, now: int, left: int = 0) -> bool:
        """Give the model so many free blocks if free slabs suffice, but for those to be `left`, that nobody
        older waits for: then it does not matter who of its sequences wants them. Else nothing is taken."""
        missing = -(-(num_blocks - model.free_blocks) // model.blocks_per_slab)
        room = missing if model.kv_limit is None else model.kv_limit - model.kv_slabs
        free = self.free - left
        if missing > min(room, free) or missing > free - self._reserved(model, now, for_weights=False):
            return False
        self._take(missing)
        model.kv_slabs += missing
        return True

    def _take(self, num_slabs: int) -> None:
        self.free -= num_slabs
        if self.free < self.promised:
            self._owner.stop_growing()

    def spare(self, model: SimModel) -> int:
        """Slabs that a run of the model may take on its way: `take_free` will find each of them free as long
        as the promise is kept. None while anybody waits for weights."""
        if any(m.state is ModelState.FETCHING and (m.tickets or m.is_wanted) for m in self._models.values()):
            return 0
        room = NEVER if model.kv_limit is None else model.kv_limit - model.kv_slabs
        return max(0, min(room, self.free - self.promised))

    def grow(self, model: SimModel) -> int:
        """Take of what was promised to the model's run what it lacks by now; how many slabs."""
        missing = -(model.free_blocks // model.blocks_per_slab)
        if missing <= 0:
            return 0
        self.free -= missing
        self.promised -= missing
        model.kv_slabs += missing
        return missing

    def _raise(self, model: SimModel, num_blocks: int, want: Want, now: int) -> bool:
        limit, per_slab = model.kv_limit, model.blocks_per_slab
        while (lacking := num_blocks - model.free_blocks) > 0:
            room, spare = (
                None if limit is None else limit - model.kv_slabs,
                self.free - self._reserved(model, now, for_weights=False),
            )
            step = take_or_need(model.name, lacking, per_slab, spare=spare, room=room, want=want)
            if isinstance(step, Need):
                if not self._give(step, now):
                    return False
                continue
            self._take(step)
            model.kv_slabs += step
        return True

    def ensure_weights(self, model: SimModel, now: int) -> bool:
        """Whether the model's activation has what it takes, after asking others for it."""
        rank = rank_of(model)
        wanted = slabs_to_activate(model) + self._reserved(model, now, for_weights=True)
        may_displace = self._may_displace(model, now)
        while (missing := wanted - self.free) > 0:
            own = min(missing, slabs_to_activate(model))
            need = Need(
                model.name, own, rank, for_weights=True, reserved=missing - own, may_displace=may_displace
            )
            if not self._give(need, now):
                return False
        return True

    def activate(self, model: SimModel) -> None:
        """Take what an activation takes."""
        self._take(slabs_to_activate(model))
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
            self._owner.stop_growing(model)
            model.kv_slabs -= spare
            self.free += spare
            self._owner.has_shrunk(model)

    def _may_displace(self, model: SimModel, now: int) -> bool:
        """Others may be stopped so that this model can be loaded."""
        return now >= self.displaces_at(model)

    def displaces_at(self, model: SimModel) -> int:
        """From when on that is so."""
        oldest = model.oldest()
        if oldest is None:
            return 0
        seconds = patience(model.served.costs.activation, self._limits.max_wait)
        return first_after(oldest.arrival, seconds)

    def _reserved(self, model: SimModel, now: int, *, for_weights: bool) -> int:
        """Slabs for which older requests of models without weights are waiting, which may displace others."""
        waiting = [
            m
            for m in self._models.values()
            if m.state is ModelState.FETCHING
            and m is not model
            and (for_weights or m.name not in self._blocked)
            and (m.tickets or m.is_wanted)
            and self._may_displace(m, now)
        ]
        if not waiting:
            return 0
        rank = (rank_of(model), model.name)
        return sum(slabs_to_activate(m) for m in waiting if (rank_of(m), m.name) < rank)

    def _give(self, need: Need, now: int) -> bool:
        """Have others give what the policy says; whether asking again makes sense at once."""
        time, snapshot = to_seconds(now), self._snapshot(now)
        decisions = reclaim.decide(snapshot, need, time)
        if need.for_weights:
            self._blocked.discard(need.model)
            if not decisions and need.may_displace and reclaim.is_blocked(snapshot, need, time):
                self._blocked.add(need.model)
        if decisions:
            self._demand.add(need.slabs, time)
        results = [self._carry_out(decision) for decision in decisions]
        return any(results)

    def _carry_out(self, decision: reclaim.ReclaimDecision) -> bool:
        """Whether anything came of it."""
        model = self._models[decision.model]
        match decision:
            case reclaim.TakeSlabs(slabs=slabs):
                return self._take_empty(model, slabs)
            case reclaim.Preempt(count=count):
                for _ in range(count):
                    youngest = model.youngest_running()
                    assert youngest is not None
                    model.preempt(youngest)
                self._owner.disturb(model)
            case reclaim.CancelLoad():
                self._owner.cancel_load(model)
            case reclaim.EvictModel():
                self._owner.evict(model)
            case reclaim.DropOwnCache():
                raise AssertionError("there are no caches to drop")
            case _:
                assert_never(decision)
        return True

    def _take_empty(self, victim: SimModel, slabs: int) -> bool:
        slabs = min(slabs, victim.empty_slabs)
        victim.kv_slabs -= slabs
        self.free += slabs
        self._owner.disturb(victim)
        return slabs > 0

    # --- what the policy sees -------------------------------------------------------------------------

    def _snapshot(self, now: int) -> MemorySnapshot:
        models = self._models.values()
        loading = [m.name for m in models if m.state is ModelState.LOADING and not (m.tickets or m.is_wanted)]
        threshold = self._limits.idle_threshold
        return MemorySnapshot(
            num_retiring=0,
            unwanted_loads=tuple(loading),
            holdings=tuple(
                _holding(m, threshold, now)
                for m in models
                if m.state in (ModelState.LOADING, ModelState.ACTIVE)
            ),
            min_residency=self._limits.min_residency,
            expected_demand=self._demand.within_horizon(to_seconds(now)),
        )

    def expected_demand(self, now: int) -> float:
        """Slabs that are going to be asked for soon."""
        return self._demand.within_horizon(to_seconds(now))

    def obtainable_at_all(self) -> int:
        """Slabs that are free, or could be without touching a running sequence."""
        return self.free + sum([_to_give(model) for model in self._models.values()])

    def obtainable(self, model: SimModel, of_all: int) -> int:
        """Those that a model could still get, within its limit."""
        slabs = of_all - _to_give(model)
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
        assert 0 <= self.promised <= self.free and held + self.free == self.num_slabs


def _to_give(model: SimModel) -> int:
    """Slabs that others could get of a model, if it runs nothing all that it has."""
    if model.state is not ModelState.ACTIVE:
        return 0
    if not model.tickets and not model.is_pinned:
        return model.weight_slabs + model.kv_slabs
    return model.empty_slabs if model.kv_limit is None else 0


def rank_of(model: SimModel) -> Rank:
    """Of the model's oldest request; without one it comes behind all."""
    oldest = model.oldest()
    return LAST_RANK if oldest is None else policy_rank(oldest)


def slabs_to_activate(model: SimModel) -> int:
    """What a model takes when it is loaded: its weights, and its share or one slab of KV."""
    return model.weight_slabs + max(1, model.kv_limit or 0)


def _holding(model: SimModel, idle_threshold: float | None, now: int) -> Holding:
    costs = model.served.costs
    has_share = model.kv_limit is not None
    block_seconds = compute_seconds(costs.steps, model.layout.tokens_per_block)
    return Holding(
        model=model.name,
        is_active=model.is_active,
        is_pinned=model.is_pinned,
        kv_slabs=model.kv_slabs,
        kv_floor=model.kv_slabs if has_share else 0,
        kv_limit=model.kv_limit,
        blocks_per_slab=model.layout.blocks_per_slab,
        empty_slabs=model.empty_slabs,
        gatherable_slabs=model.empty_slabs,
        num_free_blocks=model.free_blocks,
        num_cached_blocks=0,
        block_seconds=block_seconds,
        reuse_chance=0.0,
        weight_slabs=model.weight_slabs,
        load_seconds=costs.activation,
        return_chance=model.return_chance(now, idle_threshold),
        active_since=to_seconds(model.active_since),
        oldest_request=rank_of(model) if model.tickets else None,
        running=tuple(_running(model, block_seconds, now)),
    )


def _running(model: SimModel, block_seconds: float, now: int) -> Iterator[Running]:
    for job, blocks in model.running():
        slack = to_seconds(model.next_due(job) - now)
        yield Running(policy_rank(job), blocks, blocks * block_seconds, slack)
