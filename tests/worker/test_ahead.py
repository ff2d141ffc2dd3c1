"""Which model comes before anybody asks."""

from __future__ import annotations

from prism.types import ModelId
from prism.worker.ahead import WORTH, Absent, Cached, choose

LIKELY = Absent(ModelId("likely"), 40, 0.5)
SMALL = Absent(ModelId("small"), 10, 0.1)
TINY = Absent(ModelId("tiny"), 5, 0.1)


def test_the_likeliest_comes_first_then_the_smallest() -> None:
    absent = [SMALL, TINY, LIKELY]
    assert choose(absent, 100, 100, 0.0) == "likely"
    assert choose([SMALL, TINY], 100, 100, 0.0) == "tiny"
    assert choose([], 100, 100, 0.0) is None


def test_it_leaves_room_for_what_is_going_to_be_asked_for() -> None:
    absent = [SMALL, TINY, LIKELY]
    assert choose(absent, 34, 100, 0.0) == "tiny", "a quarter stays free"
    assert choose(absent, 100, 100, 70.0) == "tiny"
    assert choose(absent, 100, 100, 96.0) is None


def test_caches_give_way_that_are_worth_less() -> None:
    """Of what is expected to be saved, they may lose a share; nobody takes from dearer ones."""
    model = Absent(ModelId("m"), 10, 0.5, load_seconds=0.2)
    limit = WORTH * 0.5 * 0.2 / 10
    for caches, comes in (
        ([], False),
        ([Cached(10, 0.9 * limit)], True),
        ([Cached(10, 1.1 * limit)], False),
        ([Cached(9, 0.0)], False),
        ([Cached(5, 0.0), Cached(5, 0.9 * limit), Cached(90, 1.0)], True),
    ):
        assert (choose([model], 25, 100, 0.0, caches) == "m") == comes, caches
