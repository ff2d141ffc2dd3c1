"""Sizes of batches that have graphs."""

from __future__ import annotations

from prism.engine.gpu.graphs import SIZES, padded_size


def test_sizes_grow_and_waste_little() -> None:
    assert list(SIZES) == sorted(set(SIZES)) and SIZES[0] == 1
    for batch in range(1, 1025):
        size = padded_size(batch, 1024)
        assert batch <= size <= max(batch + 7, batch * 1.25)


def test_the_limit_is_the_largest_size() -> None:
    assert padded_size(99, 100) == 100
    assert padded_size(100, 100) == 100
    assert padded_size(3, 2**20) == 4
