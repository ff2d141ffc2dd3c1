"""Loads share the link by deadline."""

from __future__ import annotations

from prism.sim.link import Link
from prism.sim.model import SimModel
from prism.sim.ticks import NEVER
from tests.sim.random_loads import SLAB, served

COPY = SLAB * 1000
"""Ticks of a slab at 1e9 bytes a second."""
FIXED = 10**10


def model(index: int, slabs: int) -> SimModel:
    return SimModel(served(index, slabs, 1024, 1e-3, 0.0, 1e-3), SLAB)


def test_a_load_that_somebody_waits_for_goes_before_what_was_due_earlier() -> None:
    link, ahead, slow = Link(), model(0, 2), model(1, 4)
    link.start(ahead, NEVER, 0)
    link.start(slow, 100, 0)
    assert (link.ready_at(slow), link.ready_at(ahead)) == (4 * COPY + FIXED, 6 * COPY + FIXED)
    link.hurry(ahead, 50, COPY)
    assert (link.ready_at(ahead), link.ready_at(slow)) == (3 * COPY + FIXED, 6 * COPY + FIXED)


def test_the_earliest_deadline_has_the_link() -> None:
    link, slow, urgent = Link(), model(0, 4), model(1, 2)
    link.start(slow, 100, 0)
    assert link.next_event() == 4 * COPY + FIXED
    link.start(urgent, 50, COPY)  # one slab of the first has been copied
    assert (link.ready_at(urgent), link.ready_at(slow)) == (3 * COPY + FIXED, 6 * COPY + FIXED)
    assert link.arrived(3 * COPY + FIXED - 1) == []
    assert link.arrived(3 * COPY + FIXED) == [urgent]
    assert link.arrived(6 * COPY + FIXED) == [slow]
    assert link.next_event() == NEVER


def test_a_cancelled_load_leaves_the_link_to_others() -> None:
    link, first, second = Link(), model(0, 4), model(1, 2)
    link.start(first, 1, 0)
    link.start(second, 2, 0)
    link.advance(COPY)
    link.cancel(first)
    assert link.ready_at(second) == 3 * COPY + FIXED
