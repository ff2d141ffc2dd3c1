from __future__ import annotations

import pytest

from prism.errors import DriverError
from prism.memory.arena import Arena
from prism.memory.fake import FakeDriver, Touch
from prism.memory.pool import SlabPool
from prism.memory.slabs import WeightsOwner
from prism.types import Bytes, LaneId, ModelId

SLAB = Bytes(8192)
OWNER = WeightsOwner(ModelId("a"))


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(Bytes(32 * SLAB), SLAB)


@pytest.fixture
def pool(driver: FakeDriver) -> SlabPool:
    return SlabPool(driver, SLAB, num_slabs=20)


def test_the_base_never_changes(driver: FakeDriver, pool: SlabPool) -> None:
    arena = Arena(driver, Bytes(2 * SLAB + 1), SLAB)
    assert arena.num_slabs == 3 and arena.size == 3 * SLAB
    base = arena.base
    handles = [pool.handle(slab) for slab in pool.take(OWNER, 3)]
    for order in (handles, handles[::-1]):
        arena.map(order)
        assert arena.is_mapped and not arena.is_empty
        arena.unmap()
        assert arena.is_empty and arena.base == base
    pool.give_back(OWNER, pool.owned(OWNER))
    arena.close()
    pool.close()
    driver.close()


def test_a_failed_map_leaves_nothing_mapped(driver: FakeDriver, pool: SlabPool) -> None:
    """The last slab is refused, in the third call of three, when sixteen are mapped."""
    arena = Arena(driver, Bytes(17 * SLAB), SLAB)
    handles = [pool.handle(slab) for slab in pool.take(OWNER, 17)]
    driver.faults.fail_next(17)
    with pytest.raises(DriverError, match="map"):
        arena.map(handles)
    assert arena.is_empty
    arena.map(handles)


def test_when_even_the_rollback_fails_unmap_is_tried_again(driver: FakeDriver, pool: SlabPool) -> None:
    arena = Arena(driver, Bytes(17 * SLAB), SLAB)
    driver.faults.set({driver.faults.num_calls + 17, driver.faults.num_calls + 18})
    with pytest.raises(DriverError, match="map failed"):
        arena.map([pool.handle(slab) for slab in pool.take(OWNER, 17)])
    assert not arena.is_empty and not arena.is_mapped
    arena.unmap()
    assert arena.is_empty


def test_what_the_driver_could_not_take_back_stays_known(driver: FakeDriver, pool: SlabPool) -> None:
    """The second batch of eight is refused at its third slab, and so is the driver's own roll-back: the arena
    said, once it had taken the first eight away, that it was empty.
    """
    arena = Arena(driver, Bytes(17 * SLAB), SLAB)
    handles = [pool.handle(slab) for slab in pool.take(OWNER, 17)]
    driver.faults.set({driver.faults.num_calls + number for number in (11, 12, 13)})
    with pytest.raises(DriverError, match="map failed"):
        arena.map(handles)
    assert not arena.is_empty
    arena.unmap()
    arena.map(handles)
    arena.close()
    pool.give_back(OWNER, pool.owned(OWNER))
    pool.close()
    driver.close()


def test_misuse_is_an_assertion(driver: FakeDriver, pool: SlabPool) -> None:
    arena = Arena(driver, Bytes(2 * SLAB), SLAB)
    handles = [pool.handle(slab) for slab in pool.take(OWNER, 2)]
    with pytest.raises(AssertionError, match="1 slabs for 2"):
        arena.map(handles[:1])
    arena.map(handles)
    with pytest.raises(AssertionError, match="already"):
        arena.map(handles)


def test_a_slab_may_be_shown_in_two_arenas(driver: FakeDriver, pool: SlabPool) -> None:
    """It passes to another model while the arena of the one before is still being unmapped."""
    first, second = Arena(driver, SLAB, SLAB), Arena(driver, SLAB, SLAB)
    (slab,) = pool.take(OWNER, 1)
    first.map([pool.handle(slab)])
    driver.queue(LaneId(0), reads=[Touch(first.base, SLAB, OWNER)])
    driver.complete(LaneId(0))
    second.map([pool.handle(slab)])
    driver.queue(LaneId(0), writes=[Touch(pool.address(slab), SLAB, "b")])
    driver.queue(LaneId(0), reads=[Touch(second.base, SLAB, "b")])
    first.unmap()
    driver.complete(LaneId(0))
    second.unmap()
