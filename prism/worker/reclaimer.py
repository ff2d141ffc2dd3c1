"""Carries out what reclaim.py decides, and keeps each model's holdings within its needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from prism.engine.kv_blocks import DroppedGroup, Gathered
from prism.memory.slabs import KvOwner
from prism.types import LaneId, SlabId
from prism.worker import reclaim
from prism.worker.device import Device
from prism.worker.host_kv import HostKv
from prism.worker.models import Model
from prism.worker.requests import Requests
from prism.worker.snapshot import Holding, MemorySnapshot, Need


class Reclaimer:
    """Moves slabs between models. What `evict` makes a model give up may come back a little later."""

    def __init__(
        self,
        device: Device,
        models: dict[str, Model],
        requests: Requests,
        evict: Callable[[Model], None],
        host: HostKv,
        min_residency: float,
    ) -> None:
        self._device = device
        self._host = host
        self._pool = device.pool
        self._models = models
        self._requests = requests
        self._evict = evict
        self._min_residency = min_residency

    # --- getting memory -----------------------------------------------------------------------------

    def ensure_kv(self, model: Model, num_blocks: int, arrival: float, now: float) -> None:
        """Raise a model's free blocks to `num_blocks`, as far as memory and rank allow."""
        kv = model.kv
        assert kv is not None and model.lane is not None
        while kv.num_free < num_blocks:
            missing = -(-(num_blocks - kv.num_free) // kv.layout.blocks_per_slab)
            if self._grow(model, missing, arrival):
                continue
            lacking = max(1, missing - self._spare(model, arrival, model.lane.lane_id))
            need = Need(model.name, lacking, arrival, for_weights=False)
            if not self._give(model, need, now):
                return

    def _grow(self, model: Model, count: int, arrival: float) -> bool:
        """Take free slabs that no older need is waiting for, within the model's limit."""
        kv = model.kv
        assert kv is not None
        assert model.lane is not None
        lane = model.lane.lane_id
        room = count if model.kv_limit is None else model.kv_limit - kv.num_slabs
        count = min(count, room, self._spare(model, arrival, lane))
        if count <= 0:
            return False
        for slab in self._pool.take(KvOwner(model.name), count, lane):
            kv.add_slab(slab)
        return True

    def _spare(self, model: Model, arrival: float, lane: LaneId) -> int:
        """Slabs that the model may take: none that an older need waits for. Negative if that lacks some."""
        return self._pool.num_available(lane) - self._reserved(model, arrival)

    def _reserved(self, model: Model, arrival: float) -> int:
        """Slabs for which older requests of models without weights are waiting."""
        return sum(
            slabs_to_activate(other)
            for other in self._models.values()
            if other.is_waiting_for_slabs and (self.rank(other), other.name) < (arrival, model.name)
        )

    def ensure_weights(self, model: Model, now: float) -> bool:
        """Whether the pool has what the model's activation takes, after asking others for it.

        What an older need waits for is not taken, or smaller models could starve a large one.
        """
        arrival = self.rank(model)
        wanted = slabs_to_activate(model) + self._reserved(model, arrival)
        while (missing := wanted - self._pool.num_free) > 0:
            need = Need(model.name, missing, arrival, for_weights=True)
            if not self._give(model, need, now):
                return False
        return True

    def _give(self, model: Model, need: Need, now: float) -> bool:
        """One reclaim step; whether asking again makes sense at once."""
        decision = reclaim.decide(self.snapshot(), need, now)
        match decision:
            case None | reclaim.AwaitRetirement():
                return False
            case reclaim.TakeEmpty(model=name, slabs=slabs) | reclaim.DropCache(model=name, slabs=slabs):
                return self._release_slabs(self._models[name], slabs) > 0
            case reclaim.DropOwnCache():
                assert model.kv is not None
                dropped = model.kv.drop_cached(model.kv.layout.blocks_per_slab)
                self._host.save_dropped(model, dropped)
                return bool(dropped)
            case reclaim.PreemptYoungest(model=name):
                engine = self._models[name].engine
                assert engine is not None
                return engine.scheduler.preempt_youngest() is not None
            case reclaim.CancelLoad(model=name):
                load = self._models[name].load
                assert load is not None
                load.cancel()
                return True
            case reclaim.EvictModel(model=name):
                self._evict(self._models[name])
                return True
            case _:
                assert_never(decision)

    # --- giving memory back -------------------------------------------------------------------------

    def _release_slabs(self, victim: Model, count: int) -> int:
        """Gather up to `count` slabs of a model's KV and give them back; returns how many."""
        assert victim.kv is not None
        return self._free(victim, victim.kv.gather(count))

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
        if kv is None or model.engine is None or not model.is_active:
            return  # a step of a loading model may be half launched
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

    # --- what the policy sees -----------------------------------------------------------------------

    def rank(self, model: Model) -> float:
        """Arrival of the model's oldest request; commands and preloads come behind all requests."""
        arrivals = [ticket.submit.arrival for ticket in self._requests.of_model(model.name)]
        return min(arrivals, default=float("inf"))

    def snapshot(self) -> MemorySnapshot:
        """All holdings, as values."""
        coming, unwanted = 0, []
        for model in self._models.values():
            if model.load is not None and model.load.is_cancelled:
                coming += len(model.weight_slabs) + (0 if model.kv is None else model.kv.num_slabs)
            elif model.load is not None and not model.is_wanted and not self._requests.of_model(model.name):
                unwanted.append(model.name)
        return MemorySnapshot(
            num_retiring=self._pool.num_retiring + coming,
            unwanted_loads=tuple(unwanted),
            holdings=tuple(self._holding(m) for m in self._models.values() if m.kv is not None),
            min_residency=self._min_residency,
        )

    def _holding(self, model: Model) -> Holding:
        kv, profile = model.kv, model.profile
        assert kv is not None and profile is not None
        tickets = self._requests.of_model(model.name)
        running = () if model.engine is None else model.engine.scheduler.running
        return Holding(
            model=model.name,
            is_active=model.is_active,
            is_pinned=model.pinned,
            kv_slabs=kv.num_slabs,
            kv_floor=model.kv_floor,
            kv_limit=model.kv_limit,
            empty_slabs=kv.num_empty_slabs,
            gatherable_slabs=kv.num_gatherable,
            num_cached_blocks=kv.num_cached,
            recompute_cost=profile.recompute_cost,
            last_used=model.last_used,
            active_since=model.active_since,
            is_idle=not tickets,
            oldest_request=min((t.submit.arrival for t in tickets), default=None),
            youngest_running=running[-1].arrival if running else None,
        )


def slabs_to_activate(model: Model) -> int:
    """Slabs that a model takes when it is loaded: weights, and its floor or at least one slab of KV."""
    assert model.profile is not None
    return model.profile.weight_slabs + max(1, model.kv_floor)
