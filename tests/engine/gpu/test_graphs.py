"""Graphs: which size serves which batch, which one is dropped, which ones are wanted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from prism.engine.gpu.graphs import (
    DECODES_BESIDE,
    LIKELY_PROMPTS,
    LIKELY_SIZES,
    MAX_CHUNKS,
    PROMPT_ROWS,
    SIZES,
    Graphs,
    Key,
    Wish,
    padded_beside,
    padded_prompts,
    padded_size,
    row_numbers,
)
from prism.types import Bytes

ONE, TWO = (1, 256), (2, 256)


def test_sizes_grow_and_waste_little() -> None:
    assert list(SIZES) == sorted(set(SIZES)) and SIZES[0] == 1
    for batch in range(1, 1025):
        size = padded_size(batch, 1024)
        assert batch <= size <= max(batch + 7, batch * 1.25)


def test_the_limit_is_the_largest_size() -> None:
    assert padded_size(99, 100) == 100
    assert padded_size(100, 100) == 100
    assert padded_size(3, 2**20) == 4


def test_likely_sizes_are_sizes() -> None:
    assert set(LIKELY_SIZES) <= set(SIZES) and LIKELY_SIZES[0] == 1
    assert set(LIKELY_PROMPTS) <= {(beside, rows) for beside in DECODES_BESIDE for rows in PROMPT_ROWS}


def test_prompts_have_graphs_up_to_a_limit() -> None:
    assert [padded_prompts(n, 512) for n in (1, 32, 33, 400, 512, 513)] == [32, 32, 64, 512, 512, None]
    assert padded_prompts(300, 300) is None, "the next size is larger than any step may be"


def test_full_batches_have_graphs_beside_prompts() -> None:
    assert [padded_beside(n, 256) for n in (0, 8, 9, 129, 256, 257)] == [8, 8, 32, 256, 256, None]
    assert [padded_beside(n, 60) for n in (33, 60, 61)] == [60, 60, None]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (60, 300), (256, 2048), (512, 8192)])
def test_products_of_all_graphs_are_known(batch: int, tokens: int) -> None:
    """Their kernels are loaded ahead."""
    numbers = row_numbers(batch, tokens)
    assert numbers == sorted(set(numbers)) and numbers[0] == 1
    for decodes in range(1, batch + 1):
        assert padded_size(decodes, batch) in numbers
        beside = padded_beside(decodes, batch)
        assert beside is not None and beside + MAX_CHUNKS in numbers, "rows of logits"
        for prompts in (1, 100, 2000):
            rows = padded_prompts(prompts, tokens)
            assert rows is None or beside + rows in numbers
    assert tokens in numbers and all(b - a <= 64 for a, b in pairwise(numbers) if b <= tokens)


class FakeCaptures:
    def __init__(self) -> None:
        self.wishes: list[tuple[Key, bool]] = []

    def add(self, wish: Wish, *, is_urgent: bool) -> None:
        self.wishes.append((wish.key, is_urgent))


STREAM: Any = object()


class FakeGraph:
    def __init__(self) -> None:
        self.streams: list[Any] = []

    def replay(self, stream: Any) -> None:
        self.streams.append(stream)


@pytest.fixture
def captures() -> FakeCaptures:
    return FakeCaptures()


def key(size: int, split: Any = ONE, owner: int = 1, prompt_rows: int = 0) -> Key:
    return Key(owner, size, split, prompt_rows)


def nothing() -> Any:
    raise AssertionError


def test_the_best_graph_serves(captures: FakeCaptures) -> None:
    graphs = Graphs(captures)
    assert graphs.find(key(2)) is None
    for size in (1, 8, 32):
        graphs.add(key(size), FakeGraph(), Bytes(10))
    assert graphs.find(key(8)) == key(8)
    assert graphs.find(key(8, TWO)) == key(8), "another split, but the same size"
    assert graphs.find(key(2)) == key(8) and graphs.find(key(16)) == key(32)
    assert graphs.find(key(40)) is None and graphs.find(key(8, owner=2)) is None
    graphs.add(key(24), FakeGraph(), Bytes(10))
    assert graphs.find(key(16)) == key(24)


def test_steps_with_prompts_have_graphs_of_their_own(captures: FakeCaptures) -> None:
    graphs = Graphs(captures)
    for rows, decodes in ((128, 8), (512, 8), (512, 32)):
        graphs.add(key(decodes, prompt_rows=rows), FakeGraph(), Bytes(10))

    def found(rows: int, decodes: int) -> tuple[int, int] | None:
        best = graphs.find(key(decodes, TWO, prompt_rows=rows))
        return best and (best.prompt_rows, best.size)

    assert found(128, 8) == (128, 8) and found(512, 32) == (512, 32)
    assert found(256, 8) is None and found(128, 32) is None, "shapes do not depend on what was captured"
    assert graphs.find(key(8)) is None, "decodes alone"


def test_one_row_is_never_padded(captures: FakeCaptures) -> None:
    """It has kernels of its own, whose last bits differ: texts would depend on what was captured when."""
    graphs = Graphs(captures)
    graphs.add(key(2), FakeGraph(), Bytes(10))
    assert graphs.find(key(1)) is None


def test_far_larger_graphs_do_not_serve(captures: FakeCaptures) -> None:
    graphs = Graphs(captures)
    graphs.add(key(64), FakeGraph(), Bytes(10))
    assert graphs.find(key(8)) is None and graphs.find(key(16)) == key(64)


def test_least_recently_used_ones_go_for_bytes(captures: FakeCaptures) -> None:
    graphs = Graphs(captures, Bytes(100))
    first, second = FakeGraph(), FakeGraph()
    graphs.add(key(1), first, Bytes(40))
    graphs.add(key(2), second, Bytes(40))
    assert key(1) in graphs and graphs.replay(key(1), STREAM) and first.streams == [STREAM]
    graphs.add(key(4), FakeGraph(), Bytes(40))
    assert graphs.usage == (2, 120) and graphs.find(key(2)) == key(4), "what goes leaves its memory to others"
    assert key(2) not in graphs and not graphs.replay(key(2), STREAM) and not second.streams
    graphs.add(key(8), FakeGraph(), Bytes(500))
    assert graphs.usage == (1, 620), "the newest one stays in any case"
    graphs.add(key(16), FakeGraph(), Bytes(0))
    assert graphs.usage == (1, 620), "the memory of those that have gone is no longer theirs"


def test_wishes_are_told_once_and_not_when_they_cannot_come_true(captures: FakeCaptures) -> None:
    graphs = Graphs(captures)
    graphs.want(key(1), nothing, is_urgent=True)
    graphs.want(key(2), nothing, is_urgent=False)
    assert captures.wishes == [(key(1), True), (key(2), False)]
    graphs.add(key(1), FakeGraph(), Bytes(1))
    graphs.fail(key(2))
    for size in (1, 2):
        graphs.want(key(size), nothing, is_urgent=True)
    assert len(captures.wishes) == 2
    graphs.forget(1)
    assert graphs.usage == (0, 1) and graphs.find(key(1)) is None
    graphs.want(key(2), nothing, is_urgent=True)
    assert len(captures.wishes) == 3
