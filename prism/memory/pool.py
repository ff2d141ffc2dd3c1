"""The physical memory of one device in slabs, all mapped once into one window of virtual addresses.

A slab passes from owner to owner by accounting alone (slabs.py); only growing and shrinking call the driver.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from prism.errors import DriverError, StillMapped
from prism.memory.driver import Driver, Handle
from prism.memory.ledger import Ledger
from prism.memory.slabs import Owner, SlabAccounts
from prism.types import Address, Bytes, LaneId, SlabId, Stamp


class _Stray(NamedTuple):
    """Memory that is no slab."""

    handle: Handle
    place: SlabId | None
    """Where it is still mapped."""


class SlabPool:
    """All slabs of a device. Slab i lies at `window + i * slab_bytes` for as long as it has memory."""

    def __init__(
        self, driver: Driver, slab_bytes: Bytes, num_slabs: int, max_slabs: int | None = None
    ) -> None:
        """Create and map `num_slabs` slabs, in a window with room for `max_slabs`.

        Raises `DriverError`, having given everything back, when the device refuses.
        """
        self._driver = driver
        self.slab_bytes = slab_bytes
        self._accounts = SlabAccounts(num_slabs if max_slabs is None else max_slabs)
        self._handles: dict[SlabId, Handle] = {}
        self._aliases: Counter[SlabId] = Counter()  # arenas in which a slab is mapped, or may be
        self._stray: list[_Stray] = []  # what the driver refused to take back: tried again later
        self.window_bytes = Bytes(self._accounts.max_slabs * slab_bytes)
        self.window = driver.reserve(self.window_bytes)
        try:
            self.grow(num_slabs)
        except DriverError:
            with suppress(DriverError):
                self.close()
            raise

    # --- accounting --------------------------------------------------------------------------------

    @property
    def num_slabs(self) -> int:
        """Slabs that have memory."""
        return self._accounts.num_slabs

    @property
    def num_free(self) -> int:
        """Slabs that can be taken now."""
        return self._accounts.num_free

    @property
    def num_retiring(self) -> int:
        """Slabs that will be free once queued steps have completed."""
        return self._accounts.num_retiring

    @property
    def max_slabs(self) -> int:
        """Slabs that the window has room for."""
        return self._accounts.max_slabs

    @property
    def physical_bytes(self) -> Bytes:
        """Memory that the driver has given to this pool."""
        return Bytes((self.num_slabs + len(self._stray)) * self.slab_bytes)

    def num_available(self, lane: LaneId) -> int:
        """Slabs that work queued on this lane may use."""
        return self._accounts.num_available(lane)

    def take(self, owner: Owner, count: int, lane: LaneId | None = None) -> tuple[SlabId, ...]:
        """Slabs become the owner's; raises `OutOfSlabs`, taking none, if they are too few.

        With a lane, slabs that retire there will do, for use by work that is queued on it from now on.
        """
        return self._accounts.take(owner, count, lane)

    def give_back(self, owner: Owner, slabs: Iterable[SlabId], after: Stamp | None = None) -> None:
        """Slabs leave their owner: free at once, or once the stamped step has completed."""
        self._accounts.give_back(owner, slabs, after)

    def completed(self, lane: LaneId, step: int) -> int:
        """A lane's steps up to `step` have completed; returns how many slabs became free by it."""
        return self._accounts.completed(lane, step)

    def owned(self, owner: Owner) -> tuple[SlabId, ...]:
        """Slabs of an owner, lowest first."""
        return self._accounts.owned(owner)

    def owners(self) -> dict[Owner, int]:
        """Number of slabs of everyone who has any."""
        return self._accounts.owners()

    def free_slabs(self) -> tuple[SlabId, ...]:
        """Free slabs, lowest first."""
        return self._accounts.free_slabs()

    # --- places ------------------------------------------------------------------------------------

    def address(self, slab: SlabId) -> Address:
        """Where the slab lies in the window."""
        return Address(self.window + slab * self.slab_bytes)

    def handle(self, slab: SlabId) -> Handle:
        """The slab's physical memory, for mapping it a second time."""
        return self._handles[slab]

    def add_alias(self, slabs: Iterable[SlabId]) -> None:
        """The slabs are about to be mapped in an arena too, where they may stay longer than with their owner.

        Whatever happens to them meanwhile, their memory is not released to the driver.
        """
        self._aliases.update(slabs)

    def remove_alias(self, slabs: Iterable[SlabId]) -> None:
        """The arena is empty again."""
        for slab in slabs:
            assert self._aliases[slab] > 0, f"slab {slab} is mapped in the window alone"
            self._aliases[slab] -= 1
            if not self._aliases[slab]:
                del self._aliases[slab]

    # --- memory comes and goes ---------------------------------------------------------------------

    def grow(self, count: int) -> None:
        """Add free slabs, at the lowest places; raises `DriverError` having added none."""
        added: list[SlabId] = []
        self._release_strays()
        try:
            for slab in self._accounts.absent(count):
                self._attach(slab)
                added.append(slab)
        except DriverError:
            self._accounts.add(added)
            for slab in added:
                with suppress(DriverError):  # what cannot be given back stays, as a free slab
                    self._detach(slab)
            raise
        self._accounts.add(added)

    def shrink(self, count: int) -> int:
        """Release up to `count` free slabs to the driver, the highest first; returns how many went.

        Those that are still mapped in an arena stay. Raises `DriverError` when the device refuses; the slabs
        released before stay released.
        """
        self._release_strays()
        slabs = [slab for slab in self.free_slabs()[::-1] if slab not in self._aliases][:count]
        for slab in slabs:
            self._detach(slab)
        return len(slabs)

    def _attach(self, slab: SlabId) -> None:
        if any(stray.place == slab for stray in self._stray):
            raise DriverError("map", f"slab {slab} is still mapped")
        handle = self._driver.create(self.slab_bytes)
        try:
            self._driver.map(self.address(slab), handle)
        except DriverError as error:
            self._release(_Stray(handle, slab if isinstance(error, StillMapped) else None))
            raise
        self._handles[slab] = handle

    def _detach(self, slab: SlabId) -> None:
        """Unmap and release a free slab; if unmapping fails it stays a free slab."""
        self._driver.unmap(self.address(slab), self.slab_bytes)
        self._accounts.remove(slab)
        self._release(_Stray(self._handles.pop(slab), None))

    def _release(self, stray: _Stray) -> None:
        try:
            if stray.place is not None:
                self._driver.unmap(self.address(stray.place), self.slab_bytes)
                stray = stray._replace(place=None)
            self._driver.release(stray.handle)
        except DriverError:
            self._stray.append(stray)

    def _release_strays(self) -> None:
        strays, self._stray = self._stray, []
        for stray in strays:
            self._release(stray)

    def ledger(self, graph_bytes: Bytes, reserves: Mapping[str, Bytes]) -> Ledger:
        """The pool's part of the device's memory, and what its owner counts beside."""
        return Ledger(
            slab_bytes=self.slab_bytes,
            num_slabs=self.num_slabs,
            num_free=self.num_free,
            num_retiring=self.num_retiring,
            slabs_by_owner=self.owners(),
            pool_bytes=self.physical_bytes,
            graph_bytes=graph_bytes,
            reserves=reserves,
        )

    # --- laws and end ------------------------------------------------------------------------------

    def check(self) -> None:
        """Free, owned and retiring slabs make up all, and exactly those have a handle."""
        self._accounts.check()
        assert len(self._handles) == self.num_slabs
        assert all(slab in self._handles for slab in self.free_slabs())
        for owner in self.owners():
            assert all(slab in self._handles for slab in self.owned(owner)), owner
        assert all(slab in self._handles for slab in self._aliases), "an arena shows what was released"

    def close(self) -> None:
        """Give all memory back; every slab has been given back before, and every arena unmapped.

        Raises `DriverError` when the device refuses; calling again goes on where it stopped.
        """
        assert self.num_free == self.num_slabs, f"slabs are still in use: {self.owners()}"
        assert not self._aliases, f"arenas still show slabs {sorted(self._aliases)}"
        self.shrink(self.num_slabs)
        self._release_strays()
        if self._stray:
            raise DriverError("release", f"{len(self._stray)} slabs could not be released")
        self._driver.unreserve(self.window, self.window_bytes)
