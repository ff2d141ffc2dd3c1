"""A driver without memory that knows exactly what a device would see, late and in another order.

A handle may be mapped in a window and in any number of arenas; it is released when it is mapped nowhere.
Queued steps run when the test says so. Each granule of physical memory remembers who wrote it last, so a step
that reads another's bytes, or memory that has been unmapped meanwhile, fails an assertion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import NamedTuple

from prism.errors import DriverError
from prism.memory.driver import Handle, MemoryInfo, undone
from prism.memory.failing import FaultPlan
from prism.memory.space import AddressSpace
from prism.types import Address, Bytes, LaneId, MiB, Stamp

_GRANULARITY = Bytes(2 * MiB)  # as on GPUs


class Touch(NamedTuple):
    """A range of addresses that a step reads or writes for `owner`, whose mark written content bears."""

    address: Address
    size: Bytes
    owner: object


class _Step(NamedTuple):
    number: int
    reads: tuple[Touch, ...]
    writes: tuple[Touch, ...]


class FakeDriver:
    """A strict driver over `capacity` bytes that do not exist."""

    def __init__(
        self,
        capacity: Bytes,
        granularity: Bytes = _GRANULARITY,
        *,
        fail_at: int | Collection[int] | None = None,
    ) -> None:
        self.faults = FaultPlan(fail_at)
        self._capacity = capacity
        self._granularity = granularity
        self._space = AddressSpace(granularity)
        self._next_handle = 1
        self._next_address = 1 << 40
        self._queued: dict[LaneId, deque[_Step]] = {}
        self._num_queued: dict[LaneId, int] = {}
        self._writers: dict[tuple[Handle, int], object] = {}  # (handle, granule) -> who wrote it last

    # --- the driver --------------------------------------------------------------------------------

    @property
    def granularity(self) -> Bytes:
        """See `Driver.granularity`."""
        return self._granularity

    def reserve(self, size: Bytes) -> Address:
        """See `Driver.reserve`; ranges never adjoin, so running past one is noticed."""
        self.faults.count("reserve")
        address = Address(self._next_address)
        self._space.add_range(address, size)
        self._next_address += size + self._granularity
        return address

    def unreserve(self, address: Address, size: Bytes) -> None:
        """See `Driver.unreserve`."""
        self.faults.count("unreserve")
        self._space.remove_range(address, size)

    def create(self, size: Bytes) -> Handle:
        """See `Driver.create`."""
        self.faults.count("create")
        if self._space.handle_bytes + size > self._capacity:
            raise DriverError("create", "out of memory")
        handle = Handle(self._next_handle)
        self._space.add_handle(handle, size)
        self._next_handle += 1
        return handle

    def release(self, handle: Handle) -> None:
        """See `Driver.release`."""
        self.faults.count("release")
        self._space.remove_handle(handle)

    def map(self, address: Address, *handles: Handle) -> None:
        """See `Driver.map`; each handle counts as a call, and so does what takes the others away."""
        num_mapped, end = 0, address
        try:
            for handle in handles:
                self.faults.count("map")
                end = Address(end + self._space.add_map(end, handle))
                num_mapped += 1
        except DriverError as error:
            raise undone(error, num_mapped, lambda: self.unmap(address, Bytes(end - address))) from error

    def unmap(self, address: Address, size: Bytes) -> None:
        """See `Driver.unmap`; no queued step may still touch the range."""
        self.faults.count("unmap")
        for lane, steps in self._queued.items():
            for step in steps:
                for touch in step.reads + step.writes:
                    outside = touch.address + touch.size <= address or address + size <= touch.address
                    assert outside, f"unmapping {address:#x}, which step {step.number} of lane {lane} touches"
        self._space.remove_maps(address, size)

    def memory_info(self) -> MemoryInfo:
        """See `Driver.memory_info`."""
        self.faults.count("memory_info")
        return MemoryInfo(Bytes(self._capacity - self._space.handle_bytes), self._capacity)

    def close(self) -> None:
        """See `Driver.close`; asserts that nothing leaked and nothing is queued."""
        assert not any(self._queued.values()), "steps are still queued"
        self._space.check_empty()

    # --- the device's work -------------------------------------------------------------------------

    def queue(self, lane: LaneId, reads: Sequence[Touch] = (), writes: Sequence[Touch] = ()) -> Stamp:
        """Queue a step behind the lane's others; returns its stamp (a lane's first step is 1)."""
        number = self._num_queued.get(lane, 0) + 1
        self._num_queued[lane] = number
        self._queued.setdefault(lane, deque()).append(_Step(number, tuple(reads), tuple(writes)))
        return Stamp(lane, number)

    def run_some(self, rng: Random) -> list[Stamp]:
        """Run some of the queued steps, lanes interleaved at random, each lane in order."""
        done = []
        for _ in range(rng.randint(0, sum(map(len, self._queued.values())))):
            lane = rng.choice([lane for lane, steps in self._queued.items() if steps])
            done.append(self._run_next(lane))
        return done

    def complete(self, lane: LaneId) -> Stamp:
        """Run all that is queued on the lane; returns the stamp of its last step."""
        while self._queued.get(lane):
            self._run_next(lane)
        return Stamp(lane, self._num_queued.get(lane, 0))

    def last_writer(self, address: Address) -> object:
        """Who wrote the granule at this address last; None if nobody did since it was created."""
        piece = self._space.pieces(address, Bytes(1))[0]
        return self._writers.get((piece.handle, piece.offset // self._granularity))

    def _run_next(self, lane: LaneId) -> Stamp:
        step = self._queued[lane].popleft()
        for touch in step.reads:
            for granule in self._granules(touch):
                writer = self._writers.get(granule)
                assert writer in (None, touch.owner), f"{touch.owner} reads what {writer} wrote"
        for touch in step.writes:
            for granule in self._granules(touch):
                self._writers[granule] = touch.owner
        return Stamp(lane, step.number)

    def _granules(self, touch: Touch) -> Iterator[tuple[Handle, int]]:
        for piece in self._space.pieces(touch.address, touch.size):
            first, last = piece.offset, piece.offset + piece.size - 1
            for index in range(first // self._granularity, last // self._granularity + 1):
                yield piece.handle, index
