"""Conservation of memory: whatever happens, in whatever order, and whichever driver call fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prism.errors import DriverError, OutOfSlabs
from prism.memory.arena import Arena
from prism.memory.driver import Driver, Handle, undone
from prism.memory.failing import FailingDriver
from prism.memory.fake import FakeDriver, Touch
from prism.memory.host import HostDriver
from prism.memory.ledger import Ledger
from prism.memory.pool import SlabPool
from prism.memory.slabs import KvOwner, Owner, WeightsOwner
from prism.types import Address, Bytes, LaneId, ModelId, SlabId, Stamp

SLAB = Bytes(8192)
OWNER = KvOwner(ModelId("a"))


def ledger(pool: SlabPool) -> Ledger:
    return pool.ledger(Bytes(0), {})


def test_slabs_lie_side_by_side_in_one_window() -> None:
    pool = SlabPool(FakeDriver(Bytes(8 * SLAB), SLAB), SLAB, num_slabs=3, max_slabs=5)
    assert pool.window_bytes == 5 * SLAB
    assert [pool.address(slab) for slab in pool.take(OWNER, 3)] == [pool.window + i * SLAB for i in range(3)]
    assert len({pool.handle(slab) for slab in pool.owned(OWNER)}) == 3


def test_growing_and_shrinking_touch_free_slabs_only() -> None:
    driver = FakeDriver(Bytes(8 * SLAB), SLAB)
    pool = SlabPool(driver, SLAB, num_slabs=4, max_slabs=6)
    taken = pool.take(OWNER, 2)
    assert pool.shrink(3) == 2
    assert pool.num_slabs == 2 and driver.memory_info().free == 6 * SLAB
    pool.grow(4)
    assert pool.free_slabs() == (2, 3, 4, 5)
    pool.give_back(OWNER, taken)
    pool.check()
    pool.close()
    driver.close()


def test_a_pool_that_cannot_be_filled_gives_everything_back() -> None:
    driver = FakeDriver(Bytes(2 * SLAB), SLAB)
    with pytest.raises(DriverError, match="create"):
        SlabPool(driver, SLAB, num_slabs=3)
    driver.close()


def test_a_slab_that_the_driver_keeps_stays_in_the_ledger() -> None:
    driver = FakeDriver(Bytes(8 * SLAB), SLAB)
    pool = SlabPool(driver, SLAB, num_slabs=4)
    driver.faults.fail_next(2)  # unmap, then release
    assert pool.shrink(1) == 1
    assert pool.num_slabs == 3 and pool.physical_bytes == 4 * SLAB
    ledger(pool).check(driver.memory_info())
    assert pool.shrink(0) == 0  # tries again
    assert pool.physical_bytes == 3 * SLAB
    pool.close()
    driver.close()


class Clinging(FakeDriver):
    """Maps, then sets access, as GPUs do: what is refused access may be refused to leave."""

    def map(self, address: Address, *handles: Handle) -> None:
        super().map(address, *handles)
        try:
            self.faults.count("access")
        except DriverError as error:
            raise undone(error, 1, lambda: self.unmap(address, SLAB)) from error


def test_a_slab_that_could_not_be_unmapped_is_not_mapped_over() -> None:
    driver = Clinging(Bytes(8 * SLAB), SLAB)
    pool = SlabPool(driver, SLAB, num_slabs=2, max_slabs=4)
    calls = driver.faults.num_calls
    driver.faults.set({calls + number for number in (3, 4, 5, 7)})  # access, unmap, unmap; unmap
    for expected in ("access failed", "slab 2 is still mapped"):
        with pytest.raises(DriverError, match=expected):
            pool.grow(2)
        assert pool.num_slabs == 2 and pool.physical_bytes == 3 * SLAB
        ledger(pool).check(driver.memory_info())
    pool.grow(2)
    assert pool.num_slabs == 4 and pool.physical_bytes == 4 * SLAB
    pool.close()
    driver.close()


def test_closing_a_pool_in_use_is_a_bug() -> None:
    pool = SlabPool(FakeDriver(Bytes(8 * SLAB), SLAB), SLAB, num_slabs=4)
    pool.take(OWNER, 1)
    with pytest.raises(AssertionError, match="in use"):
        pool.close()


def test_what_an_arena_still_shows_is_not_released() -> None:
    """Its owner has given it back, perhaps another has it already, and unmapping comes later."""
    driver = FakeDriver(Bytes(8 * SLAB), SLAB)
    pool = SlabPool(driver, SLAB, num_slabs=4)
    arenas = [Arena(driver, SLAB, SLAB) for _ in range(2)]
    for arena in arenas:
        slabs = pool.take(OWNER, 4)
        pool.add_alias(slabs[3:])
        arena.map([pool.handle(slabs[3])])
        pool.give_back(OWNER, slabs)
    assert pool.shrink(4) == 3 and pool.free_slabs() == (3,)
    arenas[0].unmap()
    pool.remove_alias((SlabId(3),))
    assert pool.shrink(1) == 0
    with pytest.raises(AssertionError, match="arenas still show"):
        pool.close()
    arenas[1].unmap()
    pool.remove_alias((SlabId(3),))
    with pytest.raises(AssertionError, match="window alone"):
        pool.remove_alias((SlabId(3),))
    assert pool.shrink(1) == 1
    for arena in arenas:
        arena.close()
    pool.close()
    driver.close()


# --- every call fails once -------------------------------------------------------------------------


def persist(action: Callable[[], object]) -> None:
    """Like a caller that tries again after a failure; no more than one call fails."""
    try:
        action()
    except DriverError:
        action()


def live(driver: FailingDriver) -> None:
    """A short life of pool and arena."""
    pools: list[SlabPool] = []
    persist(lambda: pools.append(SlabPool(driver, SLAB, num_slabs=4, max_slabs=8)))
    pool = pools[0]
    arenas: list[Arena] = []
    persist(lambda: arenas.append(Arena(driver, Bytes(2 * SLAB + 1), SLAB)))
    slabs = pool.take(OWNER, arenas[0].num_slabs)
    for _ in range(2):
        persist(lambda: arenas[0].map([pool.handle(slab) for slab in slabs]))
        pool.check()
        persist(arenas[0].unmap)
    pool.give_back(OWNER, slabs)
    for action in (lambda: pool.grow(3), lambda: pool.shrink(5), lambda: pool.grow(2)):
        persist(action)
        pool.check()
    persist(arenas[0].close)
    persist(pool.close)


@pytest.mark.parametrize(
    "new_driver", [lambda: FakeDriver(Bytes(8 * SLAB), SLAB), lambda: HostDriver(Bytes(8 * SLAB))]
)
def test_any_one_call_may_fail_and_nothing_is_lost(new_driver: Callable[[], Driver]) -> None:
    healthy = FailingDriver(new_driver())
    live(healthy)
    healthy.close()
    for number in range(1, healthy.faults.num_calls + 1):
        driver = FailingDriver(new_driver(), fail_at=number)
        live(driver)
        driver.close()  # asserts that nothing leaked


# --- any order -------------------------------------------------------------------------------------

MODELS = [ModelId("a"), ModelId("b")]
KV_OWNERS: list[Owner] = [KvOwner(model) for model in MODELS]
LANES: dict[object, LaneId] = {owner: LaneId(i) for i, owner in enumerate(KV_OWNERS)}
ARENA_SLABS = 2


class PoolMachine(RuleBasedStateMachine):
    """Models take and give back KV slabs and weights while their queued steps run late, and calls fail."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = FakeDriver(Bytes(12 * SLAB), SLAB)
        self.pool = SlabPool(self.driver, SLAB, num_slabs=8, max_slabs=10)
        self.arenas = {m: Arena(self.driver, Bytes(ARENA_SLABS * SLAB), SLAB) for m in MODELS}
        self.shown: dict[ModelId, tuple[SlabId, ...]] = dict.fromkeys(MODELS, ())
        self.loaded: set[ModelId] = set()
        self.written: dict[Owner, set[SlabId]] = {owner: set() for owner in KV_OWNERS}
        self.queued = dict.fromkeys(LANES.values(), 0)

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        with suppress(DriverError):
            yield

    def stamp(self, owner: Owner) -> Stamp:
        return Stamp(LANES[owner], self.queued[LANES[owner]])

    @rule(owner=st.sampled_from(KV_OWNERS), count=st.integers(0, 4))
    def take(self, owner: Owner, count: int) -> None:
        free = self.pool.free_slabs()
        try:
            assert self.pool.take(owner, count) == free[:count]
        except OutOfSlabs:
            assert count > len(free) and self.pool.free_slabs() == free

    @rule(owner=st.sampled_from(KV_OWNERS), count=st.integers(0, 4))
    def give_back(self, owner: Owner, count: int) -> None:
        slabs = self.pool.owned(owner)[:count]
        self.pool.give_back(owner, slabs, self.stamp(owner))
        self.written[owner] -= set(slabs)

    @rule(owner=st.sampled_from(KV_OWNERS))
    def step(self, owner: Owner) -> None:
        """Read all that was written before, write everything; weights are read through their arena."""
        slabs = self.pool.owned(owner)
        reads = [Touch(self.pool.address(s), SLAB, owner) for s in slabs if s in self.written[owner]]
        writes = [Touch(self.pool.address(s), SLAB, owner) for s in slabs]
        arena = self.arenas[owner.model]
        if owner.model in self.loaded:
            reads.append(Touch(arena.base, arena.size, WeightsOwner(owner.model)))
        stamp = self.driver.queue(LANES[owner], reads, writes)
        self.written[owner] |= set(slabs)
        self.queued[stamp.lane] = stamp.step

    @rule(seed=st.integers(0, 1000))
    def run_some(self, seed: int) -> None:
        for stamp in self.driver.run_some(Random(seed)):
            self.pool.completed(stamp.lane, stamp.step)

    @rule(model=st.sampled_from(MODELS))
    def load(self, model: ModelId) -> None:
        """Write the weights through the window, in the model's lane as a copy would, and map beside it."""
        arena, owner, lane = self.arenas[model], WeightsOwner(model), LANES[KvOwner(model)]
        if self.shown[model] or self.pool.num_free < ARENA_SLABS:
            return
        slabs = self.shown[model] = self.pool.take(owner, ARENA_SLABS)
        self.pool.add_alias(slabs)
        writes = [Touch(self.pool.address(slab), SLAB, owner) for slab in slabs]
        self.queued[lane] = self.driver.queue(lane, writes=writes).step
        self.loaded.add(model)
        with self.may_fail():
            arena.map([self.pool.handle(slab) for slab in slabs])
        if not arena.is_mapped:
            self.evict(model)

    @rule(model=st.sampled_from(MODELS))
    def evict(self, model: ModelId) -> None:
        """The slabs go at once, or when the lane's queued steps have run; the arena still shows them."""
        if model in self.loaded:
            self.loaded.remove(model)
            owner = WeightsOwner(model)
            self.pool.give_back(owner, self.pool.owned(owner), self.stamp(KvOwner(model)))

    @rule(model=st.sampled_from(MODELS))
    def unmap(self, model: ModelId) -> None:
        """Later, when the lane's steps have run and the slabs may be anybody's."""
        if model in self.loaded or not self.shown[model]:
            return
        self.complete(LANES[KvOwner(model)])
        with self.may_fail():
            self.arenas[model].unmap()
        if self.arenas[model].is_empty:
            self.pool.remove_alias(self.shown[model])
            self.shown[model] = ()

    @rule(count=st.integers(0, 3))
    def grow(self, count: int) -> None:
        count = min(count, self.pool.max_slabs - self.pool.num_slabs)
        with self.may_fail():
            self.pool.grow(count)

    @rule(count=st.integers(0, 3))
    def shrink(self, count: int) -> None:
        with self.may_fail():
            assert self.pool.shrink(count) <= count

    @precondition(lambda self: self.driver.faults.num_calls < 200)
    @rule(calls=st.sets(st.integers(1, 8), min_size=1, max_size=3))
    def break_soon(self, calls: set[int]) -> None:
        self.driver.faults.set({self.driver.faults.num_calls + call for call in calls})

    @rule(lane=st.sampled_from(sorted(LANES.values())))
    def complete(self, lane: LaneId) -> None:
        self.pool.completed(*self.driver.complete(lane))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        with self.driver.faults.paused():
            ledger(self.pool).check(self.driver.memory_info())

    def teardown(self) -> None:
        self.driver.faults.set(None)
        for lane in LANES.values():
            self.complete(lane)
        for model in MODELS:
            self.evict(model)
            self.unmap(model)
            self.arenas[model].close()
        for owner in KV_OWNERS:
            self.pool.give_back(owner, self.pool.owned(owner), self.stamp(owner))
        self.pool.close()
        self.driver.close()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=50)
