"""When a worker looks for garbage."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from prism.worker import garbage


class Ring:
    """Only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def dropped_ring() -> weakref.ref[Ring]:
    return weakref.ref(Ring())


@pytest.fixture
def taken_over() -> Iterator[None]:
    garbage.take_over()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("taken_over")
def test_python_does_not_look_by_itself() -> None:
    rings = [dropped_ring() for _ in range(10 * gc.get_threshold()[0])]
    assert all(ring() is not None for ring in rings)
    assert garbage.num_new() >= len(rings)


@pytest.mark.usefixtures("taken_over")
@pytest.mark.parametrize(
    ("limit", "look"),
    [("NEW_WHEN_IDLE", garbage.while_idle), ("NEW_WHEN_BUSY", garbage.while_busy)],
    ids=["idle", "busy"],
)
def test_a_worker_looks_when_there_is_much_that_is_new(
    monkeypatch: pytest.MonkeyPatch, limit: str, look: Callable[[], None]
) -> None:
    ring = dropped_ring()
    monkeypatch.setattr(garbage, limit, garbage.num_new() + 1000)
    look()
    assert ring() is not None
    kept = [[each] for each in range(2000)]
    look()
    assert ring() is None and garbage.num_new() < len(kept)


@pytest.mark.usefixtures("taken_over")
def test_only_an_idle_worker_looks_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring()
    gc.collect(0)  # older now than what is looked at while something runs
    found = weakref.ref(ring)
    del ring
    monkeypatch.setattr(garbage, "NEW_WHEN_BUSY", 0)
    monkeypatch.setattr(garbage, "NEW_WHEN_IDLE", 0)
    _new = [[each] for each in range(10)]
    garbage.while_busy()
    assert found() is not None
    _new.append([-1])
    garbage.while_idle()
    assert found() is None
