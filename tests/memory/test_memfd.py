"""Pages of a memory file that are looked up all at once."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator

import pytest

from prism.memory import memfd
from prism.types import Address, Bytes, MiB
from tests.support.pages import CAN_TOUCH, HAS_LARGE_PAGES

SIZE = Bytes(8 * MiB)
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def place() -> Iterator[Address]:
    """A mapping of new pages."""
    fd = memfd.create_memfd("test")
    memfd.allocate(fd, 0, SIZE)
    address = memfd.reserve_addresses(SIZE)
    memfd.map_file(address, SIZE, fd, 0)
    yield address
    memfd.unreserve_addresses(address, SIZE)
    os.close(fd)


def faults_of_writing(address: Address) -> int:
    """Pages that had to be looked up when each was written."""
    pages = range(address, address + SIZE, PAGE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for page in pages:
        ctypes.c_char.from_address(page).value = b"x"
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not CAN_TOUCH, reason="Linux before 5.14")
def test_touched_pages_are_not_looked_up_again(place: Address) -> None:
    memfd.touch(place, SIZE, writable=True)
    assert faults_of_writing(place) < SIZE // PAGE // 10


@pytest.mark.skipif(HAS_LARGE_PAGES, reason="memory files have large pages here")
def test_other_pages_are(place: Address) -> None:
    assert faults_of_writing(place) > SIZE // PAGE // 10


def test_addresses_without_memory_are_left_alone() -> None:
    memfd.touch(Address(1 << 40), SIZE, writable=False)
