"""What Prism knows of a device's memory, against what the device says. Memory that nobody counts is a bug."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prism.memory.driver import MemoryInfo
from prism.memory.slabs import Owner
from prism.types import Bytes

_NONE = Bytes(0)


@dataclass(frozen=True, slots=True)
class Ledger:
    """A snapshot of everything counted. Sizes in bytes."""

    slab_bytes: Bytes
    num_slabs: int
    num_free: int
    num_retiring: int
    slabs_by_owner: Mapping[Owner, int]
    pool_bytes: Bytes
    """Physical memory of the pool: its slabs, and what the driver refused to take back."""
    graph_bytes: Bytes = _NONE
    reserves: Mapping[str, Bytes] = field(default_factory=dict)
    """Fixed amounts by name: the context, torch's allocator, other programs when the worker started."""

    @property
    def counted(self) -> Bytes:
        """Everything that Prism holds of the device."""
        return Bytes(self.pool_bytes + self.graph_bytes + sum(self.reserves.values()))

    def unaccounted(self, reported: MemoryInfo) -> Bytes:
        """Used by the device's account, but not by ours; negative when we count too much."""
        return Bytes(reported.total - reported.free - self.counted)

    def check(self, reported: MemoryInfo, tolerance: Bytes = _NONE) -> None:
        """Slabs add up, and both accounts agree within `tolerance`; `AssertionError` says what does not."""
        held = sum(self.slabs_by_owner.values())
        total = self.num_free + self.num_retiring + held
        assert total == self.num_slabs, f"{total} slabs found of {self.num_slabs}"
        assert self.pool_bytes >= self.num_slabs * self.slab_bytes, "the pool holds less than its slabs"
        difference = self.unaccounted(reported)
        assert abs(difference) <= tolerance, f"{difference} bytes unaccounted for, {tolerance} tolerated"
