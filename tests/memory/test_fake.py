"""The strict driver notices every broken rule; the other tests rely on that."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from prism.errors import DriverError
from prism.memory.driver import Handle
from prism.memory.fake import FakeDriver, Touch
from prism.types import Address, Bytes, LaneId, MiB

SLAB = Bytes(2 * MiB)
LANE, OTHER_LANE = LaneId(0), LaneId(1)


def new_driver(**options: object) -> FakeDriver:
    return FakeDriver(Bytes(16 * SLAB), **options)  # type: ignore[arg-type]


def mapped(driver: FakeDriver, count: int = 1) -> Address:
    """Addresses of `count` slabs with memory."""
    base = driver.reserve(Bytes(count * SLAB))
    for i in range(count):
        driver.map(Address(base + i * SLAB), driver.create(SLAB))
    return base


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("multiple", lambda d: d.create(Bytes(SLAB + 1))),
        ("multiple", lambda d: d.reserve(Bytes(0))),
        ("not reserved", lambda d: d.map(Address(d.reserve(SLAB) + SLAB), d.create(SLAB))),
        ("not reserved", lambda d: d.map(d.reserve(SLAB), d.create(Bytes(2 * SLAB)))),
        ("not aligned", lambda d: d.map(Address(d.reserve(Bytes(2 * SLAB)) + 4096), d.create(SLAB))),
        ("unknown handle", lambda d: d.map(d.reserve(SLAB), Handle(99))),
        ("mapped at", lambda d: d.map(mapped(d), d.create(SLAB))),
        ("nothing is mapped", lambda d: d.unmap(d.reserve(SLAB), SLAB)),
        ("nothing is mapped", lambda d: d.unmap(mapped(d), Bytes(2 * SLAB))),
        ("still mapped", lambda d: (mapped(d), d.release(Handle(1)))),
        ("unknown handle", lambda d: (h := d.create(SLAB), d.release(h), d.release(h))),
        ("has memory", lambda d: d.unreserve(mapped(d), SLAB)),
        ("no range", lambda d: d.unreserve(d.reserve(Bytes(2 * SLAB)), SLAB)),
        ("still mapped", lambda d: (mapped(d), d.close())),
        ("not released", lambda d: (d.create(SLAB), d.close())),
        ("still reserved", lambda d: (d.reserve(SLAB), d.close())),
        ("still queued", lambda d: (d.queue(LANE), d.close())),
    ],
)
def test_a_broken_rule_is_an_assertion(rule: str, break_it: Callable[[FakeDriver], object]) -> None:
    with pytest.raises(AssertionError, match=rule):
        break_it(new_driver())


def test_overlapping_maps_of_different_sizes_are_noticed_on_both_sides() -> None:
    driver = new_driver()
    base = driver.reserve(Bytes(4 * SLAB))
    driver.map(Address(base + SLAB), driver.create(Bytes(2 * SLAB)))
    for offset, size in ((0, 2), (2, 1), (2, 2)):
        with pytest.raises(AssertionError, match="mapped at"):
            driver.map(Address(base + offset * SLAB), driver.create(Bytes(size * SLAB)))


def test_a_handle_is_not_unmapped_in_part() -> None:
    driver = new_driver()
    base = driver.reserve(Bytes(2 * SLAB))
    driver.map(base, driver.create(Bytes(2 * SLAB)))
    with pytest.raises(AssertionError, match="reaches past"):
        driver.unmap(base, SLAB)


def test_past_the_capacity_create_fails() -> None:
    driver = new_driver()
    driver.create(Bytes(16 * SLAB))
    with pytest.raises(DriverError, match="create"):
        driver.create(SLAB)
    assert driver.memory_info().free == 0


def test_the_chosen_call_fails_and_changes_nothing() -> None:
    driver = new_driver(fail_at=2)
    base = driver.reserve(SLAB)
    with pytest.raises(DriverError, match="create failed: injected"):
        driver.create(SLAB)
    assert driver.memory_info().free == 16 * SLAB
    driver.unreserve(base, SLAB)
    driver.close()
    assert driver.faults.num_calls == 4


def test_memory_in_flight_is_not_unmapped() -> None:
    driver = new_driver()
    base = mapped(driver, 2)
    driver.queue(LANE, reads=[Touch(Address(base + 4096), Bytes(10), "a")])
    driver.unmap(Address(base + SLAB), SLAB)
    with pytest.raises(AssertionError, match="touches"):
        driver.unmap(base, SLAB)
    assert driver.complete(LANE).step == 1
    driver.unmap(base, SLAB)


def test_a_step_that_runs_late_finds_its_memory_gone() -> None:
    driver = new_driver()
    base = driver.reserve(SLAB)
    driver.queue(LANE, writes=[Touch(base, SLAB, "a")])
    with pytest.raises(AssertionError, match="nothing is mapped"):
        driver.complete(LANE)


def test_a_late_write_of_a_former_owner_is_seen() -> None:
    driver = new_driver()
    base = mapped(driver)
    driver.queue(LANE, writes=[Touch(base, SLAB, "former")])
    driver.queue(OTHER_LANE, writes=[Touch(base, SLAB, "new")])
    driver.complete(OTHER_LANE)
    assert driver.last_writer(base) == "new"
    driver.complete(LANE)
    driver.queue(OTHER_LANE, reads=[Touch(base, SLAB, "new")])
    with pytest.raises(AssertionError, match="new reads what former wrote"):
        driver.complete(OTHER_LANE)


def test_an_alias_shows_the_same_content() -> None:
    driver = new_driver()
    handle = driver.create(SLAB)
    window, arena = driver.reserve(SLAB), driver.reserve(SLAB)
    driver.map(window, handle)
    driver.map(arena, handle)
    driver.queue(LANE, writes=[Touch(arena, SLAB, "a")])
    driver.complete(LANE)
    driver.unmap(arena, SLAB)
    assert driver.last_writer(window) == "a"


def test_a_handle_is_released_when_it_is_mapped_nowhere() -> None:
    driver = new_driver()
    handle = driver.create(SLAB)
    places = [driver.reserve(SLAB) for _ in range(3)]
    for place in places:
        driver.map(place, handle)
    for place in places:
        with pytest.raises(AssertionError, match="still mapped"):
            driver.release(handle)
        driver.unmap(place, SLAB)
    driver.release(handle)


def test_an_arena_may_be_unmapped_while_a_step_reads_the_same_memory_elsewhere() -> None:
    driver = new_driver()
    handle = driver.create(SLAB)
    window, arena = driver.reserve(SLAB), driver.reserve(SLAB)
    driver.map(window, handle)
    driver.map(arena, handle)
    driver.queue(LANE, writes=[Touch(window, SLAB, "next")])
    driver.unmap(arena, SLAB)
    driver.complete(LANE)
    assert driver.last_writer(window) == "next"


def test_steps_of_a_lane_run_in_order_whatever_the_others_do() -> None:
    driver = new_driver()
    for _ in range(20):
        driver.queue(LANE)
        driver.queue(OTHER_LANE)
    done, rng = [], Random(0)
    while len(done) < 40:
        done += driver.run_some(rng)
    for lane in (LANE, OTHER_LANE):
        assert [stamp.step for stamp in done if stamp.lane == lane] == list(range(1, 21))
    driver.close()
