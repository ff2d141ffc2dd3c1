"""Who owns which slab. Pure accounting: it knows numbers of slabs, no memory.

    absent ──grow──> free ──take──> owned ──give_back──> free             nothing queued can touch it
       ^              |  ^            └─────give_back──> retiring ──┐     until the stamp's step has completed
       └───shrink─────┘  └───────────────────completed─────────────┘

Slabs are numbered by their place in the window; absent ones are places without memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from prism.errors import OutOfSlabs
from prism.types import LaneId, ModelId, SlabId, Stamp


@dataclass(frozen=True, slots=True)
class KvOwner:
    """A model's keys and values."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class WeightsOwner:
    """A model's weights."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class LaneOwner:
    """A lane's workspaces."""

    lane: LaneId


Owner = KvOwner | WeightsOwner | LaneOwner


class SlabAccounts:
    """The state of every slab of one device."""

    def __init__(self, max_slabs: int) -> None:
        self.max_slabs = max_slabs
        self._absent = [SlabId(i) for i in range(max_slabs)]  # sorted, as is _free
        self._free: list[SlabId] = []
        self._owner_of: dict[SlabId, Owner] = {}
        self._slabs_of: dict[Owner, set[SlabId]] = {}
        self._retiring: dict[LaneId, list[tuple[int, SlabId]]] = {}  # heaps by step
        self._completed: dict[LaneId, int] = {}

    # --- what there is -----------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs that have memory."""
        return self.max_slabs - len(self._absent)

    @property
    def num_free(self) -> int:
        """Slabs that can be taken."""
        return len(self._free)

    @property
    def num_retiring(self) -> int:
        """Slabs without an owner that queued steps may still touch."""
        return sum(map(len, self._retiring.values()))

    def free_slabs(self) -> tuple[SlabId, ...]:
        """Free slabs, lowest first."""
        return tuple(self._free)

    def owned(self, owner: Owner) -> tuple[SlabId, ...]:
        """Slabs of an owner, lowest first."""
        return tuple(sorted(self._slabs_of.get(owner, ())))

    def owners(self) -> dict[Owner, int]:
        """Number of slabs of everyone who has any."""
        return {owner: len(slabs) for owner, slabs in self._slabs_of.items()}

    # --- owners come and go ------------------------------------------------------------------------

    def num_available(self, lane: LaneId) -> int:
        """Slabs that work queued on this lane may use: free ones, and those retiring behind its own steps."""
        return len(self._free) + len(self._retiring.get(lane, ()))

    def take(self, owner: Owner, count: int, lane: LaneId | None = None) -> tuple[SlabId, ...]:
        """The lowest free slabs become the owner's; raises `OutOfSlabs`, taking none, if they are too few.

        With a lane, slabs retiring there will do too: what the owner queues on it runs behind the steps that
        may still touch them.
        """
        assert count >= 0
        available = len(self._free) if lane is None else self.num_available(lane)
        if count > available:
            raise OutOfSlabs(count, available)
        slabs = tuple(self._free[:count])
        del self._free[:count]
        if lane is not None and len(slabs) < count:
            retiring = self._retiring[lane]
            slabs += tuple(heappop(retiring)[1] for _ in range(count - len(slabs)))
        if slabs:
            self._slabs_of.setdefault(owner, set()).update(slabs)
            self._owner_of.update(dict.fromkeys(slabs, owner))
        return slabs

    def give_back(self, owner: Owner, slabs: Iterable[SlabId], after: Stamp | None) -> None:
        """Slabs leave their owner: free at once, or once the stamped step has completed."""
        pending = after is not None and after.step > self._completed.get(after.lane, 0)
        held = self._slabs_of.get(owner, set())
        for slab in slabs:
            assert slab in held, f"slab {slab} is not {owner}'s"
            held.remove(slab)
            del self._owner_of[slab]
            if after is not None and pending:
                heappush(self._retiring.setdefault(after.lane, []), (after.step, slab))
            else:
                insort(self._free, slab)
        if not held:
            self._slabs_of.pop(owner, None)

    def completed(self, lane: LaneId, step: int) -> int:
        """A lane's steps up to `step` have completed; returns how many slabs became free by it."""
        if step == self._completed.get(lane):
            return 0
        self._completed[lane] = max(step, self._completed.get(lane, 0))
        waiting, count = self._retiring.get(lane, []), 0
        while waiting and waiting[0][0] <= step:
            insort(self._free, heappop(waiting)[1])
            count += 1
        return count

    # --- memory comes and goes ---------------------------------------------------------------------

    def absent(self, count: int) -> tuple[SlabId, ...]:
        """The places where the next slabs would go."""
        assert count <= len(self._absent), f"{count} more slabs would pass the limit of {self.max_slabs}"
        return tuple(self._absent[:count])

    def add(self, slabs: Iterable[SlabId]) -> None:
        """Absent slabs have memory now, and are free."""
        for slab in slabs:
            _discard(self._absent, slab)
            insort(self._free, slab)

    def remove(self, slab: SlabId) -> None:
        """A free slab has no memory any more."""
        _discard(self._free, slab)
        insort(self._absent, slab)

    def check(self) -> None:
        """Every slab is in exactly one state, and both directions of ownership agree."""
        retiring = [slab for heap in self._retiring.values() for _, slab in heap]
        assert self._absent == sorted(self._absent) and self._free == sorted(self._free)
        everything = [*self._absent, *self._free, *self._owner_of, *retiring]
        assert sorted(everything) == list(range(self.max_slabs)), "a slab is lost or has two states"
        assert self.num_free + len(self._owner_of) + len(retiring) == self.num_slabs
        assert Counter(self._owner_of.values()) == self.owners()
        for owner, slabs in self._slabs_of.items():
            assert all(self._owner_of[slab] == owner for slab in slabs), owner
        for lane, heap in self._retiring.items():
            assert all(step > self._completed.get(lane, 0) for step, _ in heap), f"lane {lane} retires late"


def _discard(slabs: list[SlabId], slab: SlabId) -> None:
    """Take a slab out of a sorted list."""
    index = bisect_left(slabs, slab)
    assert slabs[index : index + 1] == [slab], f"slab {slab} is not in that state"
    del slabs[index]
