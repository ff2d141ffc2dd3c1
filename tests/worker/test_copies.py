"""Copies are as few as they can be, and stay within what the driver takes for one piece of memory."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from prism.types import Address, Bytes
from prism.worker.copies import Grid, Run, cut, merged

runs = st.lists(
    st.builds(
        Run,
        st.integers(100, 400).map(Address),
        st.integers(1000, 1400).map(Address),
        st.integers(1, 90).map(Bytes),
    ),
    max_size=6,
)


def bytes_of(some: list[Run]) -> list[tuple[int, int]]:
    """Which byte goes where, in order."""
    return [(source + i, target + i) for source, target, size in some for i in range(size)]


@given(runs)
def test_nothing_is_lost(some: list[Run]) -> None:
    found = merged(some)
    cuts = list(cut(found, Grid(Address(100), Bytes(32)), Grid(Address(1000), Bytes(24))))
    assert bytes_of(found) == bytes_of(cuts) == bytes_of(some)
    for source, target, size in cuts:
        assert (source - 100) // 32 == (source + size - 1 - 100) // 32
        assert (target - 1000) // 24 == (target + size - 1 - 1000) // 24


def test_neighbours_become_one() -> None:
    blocks = [Run(Address(i), Address(1000 + i), Bytes(10)) for i in (0, 10, 20, 40)]
    assert merged(blocks) == [Run(Address(0), Address(1000), Bytes(30)), blocks[3]]
    assert merged([blocks[0], Run(Address(10), Address(2000), Bytes(10))]) != merged(blocks[:2])


def test_copies_stay_within_what_was_registered_at_once() -> None:
    """A copy over two ranges that had been registered one by one was an invalid value to CUDA."""
    run = Run(Address(0), Address(1010), Bytes(30))
    cuts = list(cut([run], Grid(Address(0), Bytes(64)), Grid(Address(1000), Bytes(16))))
    assert [size for _, _, size in cuts] == [6, 16, 8]
