"""Real pages: what is given back goes back to the system, and a shortage is an error."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from prism.errors import DriverError, StillMapped
from prism.memory import host, memfd
from prism.memory.arena import Arena
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.memory.slabs import KvOwner
from prism.types import Address, Bytes, MiB, ModelId

SLAB = Bytes(2 * MiB)
OWNER = KvOwner(ModelId("a"))


@pytest.fixture
def driver() -> Iterator[HostDriver]:
    driver = HostDriver(Bytes(32 * SLAB))
    yield driver
    driver.close()


def resident_bytes(begin: int, size: int) -> int:
    """Pages of a range of addresses that this process has touched, counted page by page by the kernel."""
    total, is_inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.isalpha() and name == "Rss" and is_inside:
            total += int(rest.split()[0]) * 1024
        elif "-" in name.split()[0]:
            is_inside = begin <= int(line.partition("-")[0], 16) < begin + size
    return total


def status_shmem_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssShmem"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssShmem")


def test_memory_falls_by_exactly_what_is_given_back(driver: HostDriver) -> None:
    pool = SlabPool(driver, SLAB, num_slabs=12)
    taken = pool.take(OWNER, 4)
    ctypes.memset(pool.window, 1, pool.window_bytes)
    place = pool.window, pool.window_bytes
    used, resident, shmem = memfd.allocated_bytes(driver._fd), resident_bytes(*place), status_shmem_bytes()
    assert used == resident == 12 * SLAB
    assert pool.shrink(5) == 5
    assert memfd.allocated_bytes(driver._fd) == used - 5 * SLAB
    assert resident_bytes(*place) == resident - 5 * SLAB
    assert abs(status_shmem_bytes() - (shmem - 5 * SLAB)) <= MiB  # kept per CPU, so this one is rough
    assert driver.memory_info() == (25 * SLAB, 32 * SLAB)
    pool.give_back(OWNER, taken)
    pool.close()
    assert memfd.allocated_bytes(driver._fd) == 0


def test_created_memory_is_there_before_it_is_touched(driver: HostDriver) -> None:
    handle = driver.create(SLAB)
    assert driver.memory_info().free == 31 * SLAB
    driver.release(handle)


def test_an_alias_shows_the_same_bytes_and_may_leave_alone(driver: HostDriver) -> None:
    pool = SlabPool(driver, SLAB, num_slabs=4)
    arena = Arena(driver, Bytes(2 * SLAB), SLAB)
    slabs = pool.take(OWNER, 4)[2:0:-1]  # not in the order of the window
    arena.map([pool.handle(slab) for slab in slabs])
    ctypes.memset(arena.base, 7, SLAB)
    ctypes.memset(Address(arena.base + SLAB), 8, SLAB)
    arena.unmap()
    assert ctypes.string_at(pool.address(slabs[0]), 1) == b"\x07"
    assert ctypes.string_at(pool.address(slabs[1]) + SLAB - 1, 1) == b"\x08"
    arena.map([pool.handle(slab) for slab in slabs[::-1]])
    assert ctypes.string_at(arena.base, 1) == b"\x08"
    arena.close()
    pool.give_back(OWNER, pool.owned(OWNER))
    pool.close()


def test_released_memory_is_never_seen_again(driver: HostDriver) -> None:
    base = driver.reserve(SLAB)
    for _ in range(3):
        handle = driver.create(SLAB)
        driver.map(base, handle)
        assert ctypes.string_at(base, SLAB) == bytes(SLAB)
        ctypes.memset(base, 1, SLAB)
        driver.unmap(base, SLAB)
        driver.release(handle)
    driver.unreserve(base, SLAB)


def test_past_the_capacity_create_fails(driver: HostDriver) -> None:
    handle = driver.create(Bytes(32 * SLAB))
    with pytest.raises(DriverError, match="create failed: ENOSPC"):
        driver.create(SLAB)
    driver.release(handle)
    driver.release(driver.create(Bytes(32 * SLAB)))


def test_a_full_machine_is_an_error_before_it_is_a_killed_process(
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: SLAB - 1)
    with pytest.raises(DriverError, match="create failed: ENOMEM"):
        driver.create(SLAB)
    monkeypatch.undo()
    driver.release(driver.create(Bytes(32 * SLAB)))  # nothing was counted for the one that failed


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("reserve", "reserve_addresses"),
        ("create", "allocate"),
        ("map", "map_file"),
        ("unmap", "unmap_file"),
        ("release", "punch_hole"),
        ("unreserve", "unreserve_addresses"),
    ],
)
def test_a_failed_system_call_changes_nothing(
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch, call: str, function: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    def live() -> None:
        base = driver.reserve(SLAB)
        undo.append(lambda: driver.unreserve(base, SLAB))
        handle = driver.create(SLAB)
        undo.append(lambda: driver.release(handle))
        driver.map(base, handle)
        undo.append(lambda: driver.unmap(base, SLAB))
        while undo:
            undo[-1]()
            undo.pop()

    undo: list = []
    monkeypatch.setattr(memfd, function, fail)
    with pytest.raises(DriverError, match=f"{call} failed: ENOMEM"):
        live()
    monkeypatch.undo()
    while undo:
        undo.pop()()


def test_mapping_that_fails_half_way_tells_why_even_if_it_cannot_be_undone(
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was told was that unmapping had failed, too."""
    base = driver.reserve(Bytes(2 * SLAB))
    first, second = driver.create(SLAB), driver.create(SLAB)
    map_file = memfd.map_file

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    def map_first(address: Address, size: Bytes, fd: int, offset: int) -> None:
        (map_file if address == base else fail)(address, size, fd, offset)

    monkeypatch.setattr(memfd, "map_file", map_first)
    monkeypatch.setattr(memfd, "unmap_file", fail)
    with pytest.raises(StillMapped, match=r"^map failed: ENOMEM") as caught:
        driver.map(base, first, second)
    assert caught.value.num_handles == 1
    monkeypatch.undo()
    driver.unmap(base, SLAB)
    driver.release(first)
    driver.release(second)
    driver.unreserve(base, Bytes(2 * SLAB))


def test_closing_with_memory_in_use_is_a_bug() -> None:
    driver = HostDriver(SLAB)
    handle = driver.create(SLAB)
    with pytest.raises(AssertionError, match="not released"):
        driver.close()
    driver.release(handle)
    driver.close()
