"""Carries out what reclaim.py decides, and keeps each model's holdings within its needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import assert_never

from prism.engine.kv_blocks import Gathered
from prism.engine.kv_slab import DroppedGroup
from prism.engine.scheduler import Want
from prism.memory.slabs import KvOwner
from prism.types import LaneId, ModelId, SlabId
from prism.worker import reclaim
from prism.worker.device import Device
from prism.worker.foresight import RecentDemand
from prism.worker.growth import ask_in_order, take_or_need
from prism.worker.holdings import Holdings
from prism.worker.host_kv import HostKv
from prism.worker.models import Model
from prism.worker.snapshot import Need

REFUSED_SECONDS = 0.05
"""A need for which nobody had anything to give is looked at again then, or when memory has changed: one
that goes on without would ask at each step, and an answer takes milliseconds where hundreds of them run."""


class Reclaimer:
    """Moves slabs between models. What `evict` makes a model give up may come back a little later."""

    def __init__(
        self,
        device: Device,
        models: Mapping[str, Model],
        holdings: Holdings,
        evict: Callable[[Model], None],
        host: HostKv,
    ) -> None:
        self._device = device
        self._host = host
        self._pool = device.pool
        self._models = models
        self._holdings = holdings
        self._evict = evict
        self._demand = RecentDemand()
        self._refused: dict[ModelId, tuple[Need, float]] = {}
        """The last refusal of each model, and when the same need is looked at again."""
        self._blocked: set[ModelId] = set()
        """Models whose weights wait until older requests of others end."""
        self.rank = holdings.rank

    def memory_changed(self) -> None:
        """What was refused may be had now."""
        self._refused.clear()

    def expected_demand(self, now: float) -> float:
        """Slabs that are going to be asked for soon."""
        return self._demand.within_horizon(now)

    # --- getting memory -----------------------------------------------------------------------------

    def ensure_kv(self, model: Model, wants: Sequence[Want], now: float) -> None:
        """Free blocks for what a model's sequences want, as far as memory and their ranks allow."""
        kv = model.kv
        assert kv is not None
        if sum(want.num_blocks for want in wants) > kv.num_free:
            ask_in_order(wants, lambda num_blocks, want: self._raise(model, num_blocks, want, now))

    def _raise(self, model: Model, num_blocks: int, want: Want, now: float) -> bool:
        """Raise a model's free blocks to `num_blocks`; whether they suffice."""
        kv, limit = model.kv, model.kv_limit
        assert kv is not None and model.lane is not None
        lane, per_slab = model.lane.lane_id, kv.layout.blocks_per_slab
        while (lacking := num_blocks - kv.num_free) > 0:
            room, spare = None if limit is None else limit - kv.num_slabs, self._spare(model, lane, now)
            step = take_or_need(model.name, lacking, per_slab, spare=spare, room=room, want=want)
            if isinstance(step, Need):
                if not self._give(model, step, now):
                    return False
                continue
            for slab in self._pool.take(KvOwner(model.name), step, lane):
                kv.add_slab(slab)
        return True

    def _spare(self, model: Model, lane: LaneId, now: float) -> int:
        """Slabs that the model may take: none that an older need waits for. Negative if that lacks some."""
        return self._pool.num_available(lane) - self._reserved(model, now, for_weights=False)

    def _reserved(self, model: Model, now: float, *, for_weights: bool) -> int:
        """Slabs for which older requests of models without weights are waiting, which may displace others.

        Older than the oldest of this model: while that is here nobody evicts the model, so that slabs which
        its young sequences leave to others might be of no use to them, and these stand before the oldest.

        Not for KV while those are blocked: sequences keep nobody waiting meanwhile, since they give way.
        Other weights wait all the same: they would be evicted when the older ones come.
        """
        rank = (self.rank(model), model.name)
        return sum(
            slabs_to_activate(other)
            for other in self._models.values()
            if other.is_waiting_for_slabs
            and (for_weights or other.name not in self._blocked)
            and self._holdings.is_asked_for(other)
            and (self.rank(other), other.name) < rank
            and self._holdings.may_displace(other, now)
        )

    def ensure_weights(self, model: Model, now: float) -> bool:
        """Whether the pool has what the model's activation takes, after asking others for it.

        What an older need waits for is not taken, or smaller models could starve a large one.
        """
        rank = self.rank(model)
        wanted = slabs_to_activate(model) + self._reserved(model, now, for_weights=True)
        may_displace = self._holdings.may_displace(model, now)
        while (missing := wanted - self._pool.num_free) > 0:
            own = min(missing, slabs_to_activate(model))
            need = Need(
                model.name, own, rank, for_weights=True, reserved=missing - own, may_displace=may_displace
            )
            if not self._give(model, need, now):
                return False
        return True

    def _give(self, model: Model, need: Need, now: float) -> bool:
        """Have others give what the policy says; whether asking again makes sense at once."""
        refused = self._refused.get(model.name)
        if refused is not None and refused[0] == need and now < refused[1]:
            return False
        snapshot = self._holdings.snapshot(self._demand.within_horizon(now), now)
        decisions = reclaim.decide(snapshot, need, now)
        if need.for_weights:
            self._blocked.discard(need.model)
            if not decisions and need.may_displace and reclaim.is_blocked(snapshot, need, now):
                self._blocked.add(need.model)
        if decisions:
            self._demand.add(need.slabs, now)
        else:
            self._refused[model.name] = need, now + REFUSED_SECONDS
        results = [self._carry_out(decision) for decision in decisions]
        return any(results)

    def _carry_out(self, decision: reclaim.ReclaimDecision) -> bool:
        """Whether anything came of it."""
        model = self._models[decision.model]
        match decision:
            case reclaim.TakeSlabs(slabs=slabs):
                return self._release_slabs(model, slabs) > 0
            case reclaim.DropOwnCache(blocks=blocks):
                assert model.kv is not None and model.engine is not None
                model.engine.scheduler.keep_found()
                dropped = model.kv.drop_cached(blocks)
                self._host.save_dropped(model, dropped)
                return bool(dropped)
            case reclaim.Preempt(count=count):
                assert model.engine is not None
                return model.engine.scheduler.preempt_youngest(count) > 0
            case reclaim.CancelLoad():
                assert model.load is not None
                model.load.cancel()
                return True
            case reclaim.EvictModel():
                self._evict(model)
                return True
            case _:
                assert_never(decision)

    # --- giving memory back -------------------------------------------------------------------------

    def _release_slabs(self, victim: Model, count: int) -> int:
        """Gather up to `count` slabs of a model's KV and give them back; returns how many."""
        assert victim.kv is not None
        released = 0
        while released < count and (freed := self._free(victim, victim.kv.gather(count - released))):
            released += freed
        return released

    def take_cache(self, victim: Model, count: int) -> int:
        """Have a model give up so many of the slabs in which no sequence has blocks; returns how many."""
        assert victim.kv is not None and count <= victim.kv.num_unused_slabs
        return self._release_slabs(victim, count)

    def _free(self, victim: Model, gathered: Gathered) -> int:
        """Copy what has to move and what is worth saving, and give the slabs back."""
        assert victim.engine is not None and victim.lane is not None
        if gathered.moves:
            # blocks may move to where the dropped ones are: those are saved on the lane, before that
            self._host.save_dropped(victim, (block for group in gathered.dropped for block in group))
            view = victim.engine.runner.kv
            self._device.move_blocks(victim.name, view, gathered.moves, victim.lane)
            victim.engine.scheduler.rename_blocks(gathered.moves)
            self._give_back(victim, gathered.slabs)
        else:
            self._give_back(victim, gathered.slabs, gathered.dropped)
        return len(gathered.slabs)

    def _give_back(self, model: Model, slabs: Sequence[SlabId], dropped: Sequence[DroppedGroup] = ()) -> None:
        """Free once everything that is queued on the model's lane has run, and the copies that read them."""
        assert model.kv is not None and model.lane is not None
        read = self._host.save_leaving(model, dropped)
        for slab in slabs:
            model.kv.remove_slab(slab)
        owner, swap = KvOwner(model.name), self._device.swap
        self._pool.give_back(owner, [s for s in slabs if s not in read], model.lane.stamp())
        self._pool.give_back(owner, [s for s in slabs if s in read], swap.stamp())
        self._device.settle(model.lane)
        self._device.settle(swap)

    def trim(self, model: Model) -> None:
        """Give slabs back that the model may not or need not keep.

        1. Those past its limit, at the cost of its cache; what its sequences use stays until they end.
        2. Empty slabs: all but one of a busy model, and what compaction frees of an idle one.
        """
        kv = model.kv
        if kv is None or model.engine is None or not model.is_settled:
            return
        while model.kv_limit is not None and kv.num_slabs > model.kv_limit:  # 1
            if not self._release_slabs(model, kv.num_slabs - model.kv_limit):
                break
        spare = kv.num_slabs - model.kv_floor  # 2
        if model.engine.is_idle:
            per_slab = kv.layout.blocks_per_slab
            while (count := min(spare, kv.num_free // per_slab)) > 0:
                spare -= self._free(model, kv.compact(count))
            return
        parked = len(kv.empty_slabs) - 1
        self._give_back(model, kv.empty_slabs[: max(0, min(parked, spare))])

    def release_kv(self, model: Model) -> None:
        """Give up all KV of a model that runs nothing."""
        assert model.kv is not None and not model.kv.num_used
        self._free(model, model.kv.gather(model.kv.num_slabs))
        assert model.kv.num_slabs == 0


def slabs_to_activate(model: Model) -> int:
    """Slabs that a model takes when it is loaded: weights, and its floor or at least one slab of KV."""
    assert model.profile is not None
    return model.profile.weight_slabs + max(1, model.kv_floor)
