"""What sequences take and ask for."""

from __future__ import annotations

import pytest

from prism.engine.scheduler import Want
from prism.types import ModelId, RequestId
from prism.worker.growth import ask_in_order, take_or_need
from prism.worker.snapshot import Need

M = ModelId("m")
OLD, MIDDLE, YOUNG = ((age, RequestId(""), 0) for age in (1.0, 2.0, 3.0))


def test_behind_one_that_is_refused_only_older_ones_ask() -> None:
    asked = []

    def can_have(num_blocks: int, want: Want) -> bool:
        asked.append((num_blocks, want.rank))
        return want.rank is not MIDDLE

    ask_in_order([Want(MIDDLE, 2), Want(YOUNG, 3), Want(OLD, 4), Want(MIDDLE, 1)], can_have)
    assert asked == [(2, MIDDLE), (9, OLD)]


@pytest.mark.parametrize(
    ("spare", "room", "expected"),
    [
        (9, None, 3),
        (2, None, 2),
        (9, 1, 1),
        (0, None, (3, 0)),
        (-4, None, (3, 4)),
        (9, 0, (1, 0)),
        (-1, 2, (2, 1)),
    ],
)
def test_free_slabs_are_taken_first_within_the_limit(
    spare: int, room: int | None, expected: int | tuple[int, int]
) -> None:
    """Nine blocks of four to a slab are three slabs."""
    found = take_or_need(M, 9, 4, spare=spare, room=room, want=Want(OLD, 9))
    if isinstance(found, Need):
        assert (found.slabs, found.reserved) == expected
        assert (found.model, found.rank, found.blocks, found.for_weights) == (M, OLD, 9, False)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("spare", "room", "expected"),
    [(3, None, 3), (2, None, (1, 0)), (9, 3, 3), (1, 2, (1, 0)), (9, 2, (1, 0)), (-4, None, (3, 4))],
)
def test_who_begins_again_takes_all_or_nothing(
    spare: int, room: int | None, expected: int | tuple[int, int]
) -> None:
    """It took what was free, which others wanted, and went on asking for the rest."""
    found = take_or_need(M, 9, 4, spare=spare, room=room, want=Want(OLD, 9, is_again=True))
    if isinstance(found, Need):
        assert found.is_again and (found.slabs, found.reserved) == expected
    else:
        assert found == expected
