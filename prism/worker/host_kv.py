"""Saves KV blocks that lose their place on the device, and has them fetched when they are wanted again.

    cached block dropped ──worth it?──> place in host memory ──copy out──> held there
    sequence starts ──the prefix's blocks not on the device, worth it?──> copy in, in front of its step

The accounting is engine/host_blocks.py, the memory host_chunks.py, the decision kv_costs.py, and the copying
the backend's. A copy holds references to its places until it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from prism.engine.host_blocks import Fetch, HostBlocks, HostPlace
from prism.engine.kv_layout import KvLayout
from prism.engine.kv_slab import BlockKey, Dropped, DroppedGroup, grouped
from prism.types import Address, Bytes, LaneId, ModelId, SlabId
from prism.worker.copies import CopyWork, Grid, Run, cut, merged
from prism.worker.cost_book import CostBook
from prism.worker.device import Device
from prism.worker.host_chunks import Chunks
from prism.worker.kv_costs import (
    LEAST_BYTES,
    Average,
    BlockCosts,
    again,
    block_costs,
    compute_seconds,
    is_worth_fetching,
    is_worth_saving,
)
from prism.worker.lanes import Deferred, Work
from prism.worker.models import Model

SAVE_SECONDS = 0.05
"""Most that an eviction's slabs wait for copies: what is worth less than the rest stays behind."""
MAX_RUNS = 256
"""Copies of one save. A stream takes 1,024 queued operations before it makes the host wait."""


@dataclass(slots=True, eq=False)
class _Member:
    """What is known of a model that has been active."""

    name: ModelId
    layout: KvLayout
    identity: bytes
    num_saved: int = 0
    num_fetched: int = 0


class DeferredCopy(Deferred):
    """Copies that are queued once the step has been launched in full that may still write what they read."""

    queued: CopyWork | None

    def __init__(self, queue: Callable[[], CopyWork]) -> None:
        super().__init__(queue)

    def seconds(self) -> float:
        """See `CopyWork.seconds`."""
        assert self.queued is not None
        return self.queued.seconds()


def on_device(work: CopyWork) -> CopyWork:
    """What has been queued of it."""
    if not isinstance(work, DeferredCopy):
        return work
    assert work.queued is not None
    return work.queued


class _Pending(NamedTuple):
    """A copy that has been queued."""

    work: CopyWork
    places: tuple[HostPlace, ...]
    size: Bytes
    speed: Average


class _Tier:
    """See `HostTier`."""

    def __init__(self, host: HostKv, member: _Member) -> None:
        self._host = host
        self._member = member

    def num_worth(self, keys: Iterable[BlockKey]) -> int:
        """See `HostTier.num_worth`."""
        if not is_worth_fetching(self._host.costs(self._member)):
            return 0
        count = 0
        for key in keys:
            if not self._host.blocks.has(self._member.name, key):
                break
            count += 1
        return count

    def use(self, key: BlockKey) -> HostPlace:
        """See `HostTier.use`."""
        return self._host.blocks.use(self._member.name, key)


class HostKv:
    """The host tier of one worker's prefix caches. Without `chunks` it holds nothing."""

    def __init__(self, device: Device, chunks: Chunks | None, book: CostBook) -> None:
        self._device = device
        self._chunks = chunks
        self._book = book
        size = device.slab_bytes if chunks is None else chunks.chunk_bytes
        self.blocks = HostBlocks(size, 0 if chunks is None else chunks.max_chunks)
        guess = device.backend.guess
        self.saving = Average(guess.bytes)
        self.fetching = Average(guess.bytes)
        self._members: dict[ModelId, _Member] = {}
        self._pending: list[_Pending] = []
        self._grids = (Grid(device.pool.window, device.slab_bytes), Grid(Address(0), size))
        if chunks is not None:
            self._grids = (self._grids[0], Grid(chunks.base, chunks.piece_bytes))
        self._aside: dict[HostPlace, CopyWork] = {}  # saves that no lane's order covers

    # --- what there is -----------------------------------------------------------------------------

    @property
    def total_bytes(self) -> Bytes:
        """Host memory taken."""
        return Bytes(self.blocks.num_chunks * self.blocks.chunk_bytes)

    @property
    def error(self) -> str | None:
        """Why there is no more of it."""
        return None if self._chunks is None else self._chunks.error

    def counts(self, model: ModelId) -> tuple[int, int]:
        """Blocks saved and fetched so far."""
        member = self._members.get(model)
        return (0, 0) if member is None else (member.num_saved, member.num_fetched)

    def costs(self, member: _Member) -> BlockCosts:
        """Of one block, as measured by now."""
        known, layout = self._book.of(member.name), member.layout
        assert known is not None, "nobody has told what it costs"
        compute = compute_seconds(known.steps, layout.tokens_per_block)
        return block_costs(
            layout.block_bytes, compute, saving=self.saving.value, fetching=self.fetching.value
        )

    def block_seconds(self, model: ModelId) -> float:
        """To have a block again that is dropped; 0 for a model that has never been active."""
        member = self._members.get(model)
        return 0.0 if member is None else again(self.costs(member), has_host=self._chunks is not None)

    # --- models ------------------------------------------------------------------------------------

    def open(self, model: Model, weights: bytes) -> None:
        """A model is active, with weights of this digest. What others' weights computed is forgotten."""
        profile, engine = model.profile, model.engine
        assert profile is not None and engine is not None
        described = repr((profile.spec, profile.kv, profile.weights.fingerprint, weights))
        identity = blake2b(described.encode(), digest_size=16).digest()
        member = self._members.get(model.name)
        if member is None or member.identity != identity:
            self.blocks.forget(model.name)
            member = self._members[model.name] = _Member(model.name, profile.kv, identity)
        engine.scheduler.host = None if self._chunks is None else _Tier(self, member)

    def tend(self, models: Mapping[str, Model]) -> None:
        """Take note of new chunks, and ask for as many as the device's caches could fill now."""
        chunks, blocks = self._chunks, self.blocks
        if chunks is None or blocks.num_chunks == chunks.max_chunks:
            return
        while blocks.num_chunks < chunks.num_ready:
            blocks.add_chunk()
        wanted = blocks.num_chunks - blocks.num_empty
        for model in models.values():
            member = self._members.get(model.name)
            if model.kv is not None and member is not None and is_worth_saving(self.costs(member)):
                wanted += model.kv.num_slabs
        chunks.ask(min(wanted, chunks.max_chunks))

    # --- copies ------------------------------------------------------------------------------------

    def save_leaving(self, model: Model, groups: Sequence[DroppedGroup]) -> frozenset[SlabId]:
        """Save blocks of slabs that are about to leave, the least recently used group first.

        The copies are queued on the swap lane, behind what is queued on the model's; returns the slabs that
        they read.
        """
        chosen = self._choose(model, groups)
        if not chosen:
            return frozenset()
        work = self._save(model, chosen, aside=True)
        self._device.swap.queue(model.name, work)
        if isinstance(work, DeferredCopy):
            assert model.lane is not None
            model.lane.queue(model.name, Deferred(partial(self._begin, work, model.lane.lane_id)))
        units = self._device.slab_bytes // self._members[model.name].layout.unit
        return frozenset(SlabId(item.block // units) for item in chosen)

    def save_dropped(self, model: Model, dropped: Iterable[Dropped]) -> None:
        """Save blocks whose place the model itself fills again: copied on its lane, before what follows."""
        chosen = self._choose(model, [grouped(dropped)])
        if chosen:
            assert model.lane is not None
            model.lane.queue(model.name, self._save(model, chosen, aside=False))

    def _begin(self, work: DeferredCopy, lane: LaneId) -> Work:
        """Start copies on the swap lane; on the lane itself nothing is left of them."""
        work.launch()
        return self._device.backend.mark(lane)

    def fetch(self, model: Model, fetches: Sequence[Fetch]) -> None:
        """Queue copies to the device on the model's lane; what is queued there later finds the bytes.

        All that the lane has is launched: these copies are for its next step.
        """
        if not fetches:
            return
        assert model.lane is not None and model.lane.launching is None
        member, lane, backend = self._members[model.name], model.lane, self._device.backend
        late = {id(work): work for place, _ in fetches if (work := self._aside.get(place)) is not None}
        if late:
            backend.wait_for(lane.lane_id, [on_device(work) for work in late.values()])
        pairs = sorted((self._address(member.layout, block), self._place(member, p)) for p, block in fetches)
        size = member.layout.block_bytes
        runs = merged(Run(source, target, size) for target, source in pairs)
        work = backend.copy_in(tuple(cut(runs, *self._grids[::-1])), lane.lane_id)
        lane.queue(model.name, work)
        self._note(work, tuple(place for place, _ in fetches), member, self.fetching)
        member.num_fetched += len(fetches)

    def settle(self) -> None:
        """Take note of copies that have run."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        for item in pending:
            if not item.work.is_done():
                self._pending.append(item)
                continue
            for place in item.places:
                self.blocks.release(place)
                if self._aside.get(place) is item.work:
                    del self._aside[place]
            if item.size >= LEAST_BYTES:
                item.speed.add(item.size, item.work.seconds())

    def _choose(self, model: Model, groups: Sequence[DroppedGroup]) -> list[Dropped]:
        """Blocks that are saved, in the order in which they are put: those put last are kept longest.

        1. None, if they are computed again as quickly.
        2. As many as the link carries in `SAVE_SECONDS`, less what is on its way, and as there is room for.
        3. Those used last; in a group by place, as a sequence fills it.
        4. Not more copies than a stream takes.
        """
        member = self._members.get(model.name)
        if not groups or member is None or not self.blocks.num_chunks:
            return []
        if not is_worth_saving(self.costs(member)):  # 1
            return []
        size = member.layout.block_bytes
        room = SAVE_SECONDS * self.saving.value - sum(p.size for p in self._pending if p.speed is self.saving)
        limit = min(int(room // size), self.blocks.num_obtainable(size))  # 2
        chosen: list[list[Dropped]] = []
        step, num_runs = size // member.layout.unit, MAX_RUNS
        for group in reversed(groups):  # 3
            if limit <= 0 or num_runs <= 0:  # 4
                break
            taken = _take(self._new(member, group), limit, num_runs, step)
            chosen.append(taken)
            limit -= len(taken)
            num_runs -= sum(b.block != a.block + step for a, b in pairwise(taken)) + bool(taken)
        return [block for group in reversed(chosen) for block in group]

    def _new(self, member: _Member, group: DroppedGroup) -> Iterator[Dropped]:
        """Those of a group that are not in host memory yet."""
        for item in group:
            if self.blocks.has(member.name, item.key):
                self.blocks.touch(member.name, item.key)
            else:
                yield item

    def _save(self, model: Model, chosen: list[Dropped], *, aside: bool) -> CopyWork:
        assert model.lane is not None
        member, size = self._members[model.name], self._members[model.name].layout.block_bytes
        runs, places = [], []
        for key, block, _ in chosen:
            place = self.blocks.put(member.name, key, size)
            assert place is not None, "there was room"
            places.append(place)
            runs.append(Run(self._address(member.layout, block), self._place(member, place), size))
        cuts = tuple(cut(merged(runs), *self._grids))
        copy = partial(self._device.backend.copy_out, cuts, model.lane.lane_id, aside=aside)
        work = copy() if model.lane.launching is None else DeferredCopy(copy)
        if aside:
            self._aside.update(dict.fromkeys(places, work))
        self._note(work, tuple(places), member, self.saving)
        member.num_saved += len(places)
        return work

    def _note(self, work: CopyWork, places: tuple[HostPlace, ...], member: _Member, speed: Average) -> None:
        size = Bytes(len(places) * member.layout.block_bytes)
        self._pending.append(_Pending(work, places, size, speed))
        self.settle()

    def _address(self, layout: KvLayout, block: int) -> Address:
        return Address(self._device.pool.window + block * layout.unit)

    def _place(self, member: _Member, place: HostPlace) -> Address:
        assert self._chunks is not None
        offset = place.chunk * self.blocks.chunk_bytes + place.slot * member.layout.block_bytes
        return Address(self._chunks.base + offset)

    def check(self) -> None:
        """Conservation; and every reference stands for a copy on its way."""
        self.blocks.check()
        self.blocks.check_references(place for item in self._pending for place in item.places)


def _take(items: Iterable[Dropped], limit: int, max_runs: int, step: int) -> list[Dropped]:
    """`limit` at most, those used last; by place, in no more than so many runs of neighbours."""
    newest = sorted(items, key=attrgetter("last_use"), reverse=True)[:limit]
    taken: list[Dropped] = []
    for item in sorted(newest, key=attrgetter("block")):
        max_runs -= not taken or item.block != taken[-1].block + step
        if max_runs < 0:
            break
        taken.append(item)
    return taken
