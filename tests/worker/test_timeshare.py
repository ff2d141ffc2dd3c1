"""Who has a device to itself."""

from __future__ import annotations

import pytest

from prism.types import ModelId
from prism.worker.timeshare import Choice, Contender, Present, Queue, Waiting, decide, starts_in

A, B, C = (ModelId(name) for name in "abc")


def test_nobody_else_waits() -> None:
    assert decide([Contender(A, 1.0, True), Contender(B, None, False)], A, 0.0, 5.0, 100.0) == Choice(A, True)
    assert decide([Contender(A, None, False)], None, 0.0, 5.0, 1.0) == Choice(None, True)


def test_the_oldest_request_comes_when_the_present_model_has_nothing_to_do() -> None:
    others = [Contender(B, 3.0, False), Contender(C, 2.0, False)]
    assert decide([Contender(A, None, False), *others], A, 0.0, 5.0, 1.0) == Choice(C, True)
    assert decide(others, None, 0.0, 5.0, 1.0) == Choice(C, True)


def test_after_its_quantum_it_ends_what_it_has_and_takes_no_more() -> None:
    other = Contender(B, 3.0, False)
    assert decide([Contender(A, 4.0, True), other], A, 0.0, 5.0, 4.9) == Choice(A, True)
    assert decide([Contender(A, 4.0, True), other], A, 0.0, 5.0, 5.0) == Choice(A, False)
    assert decide([Contender(A, 4.0, False), other], A, 0.0, 5.0, 5.0) == Choice(B, True)


def queue(*arrivals: float, prompt: float = 1.0, decodes: float = 2.0) -> Queue:
    return Queue([Waiting(arrival, prompt, decodes) for arrival in arrivals], activation=10.0)


NEW = Waiting(100.0, 0.0, 0.0)


def with_new(found: Queue) -> Queue:
    return Queue([*found.waiting, NEW], found.activation)


@pytest.mark.parametrize(
    ("queues", "present", "batch", "expected"),
    [
        ({A: with_new(queue())}, Present(A, 5.0, 7.0), 9, 0.0),
        ({A: with_new(queue(1, 2))}, Present(A, 5.0, 0.0), 9, 2.0),
        ({A: with_new(queue())}, Present(None, 0.0, 20.0), 9, 10.0),
        ({A: with_new(queue()), B: queue()}, Present(B, 5.0, 7.0), 9, 15.0),
        ({A: with_new(queue()), B: queue(1)}, Present(B, 1.0, 7.0), 9, 13.0),
        ({A: with_new(queue()), B: queue(1, 2, 3)}, Present(B, 1.0, 4.0), 1, 16.0),
        ({A: with_new(queue()), B: queue(1, 2, 3)}, Present(B, 1.0, 4.0), 3, 19.0),
        ({A: with_new(queue()), B: queue(1, 2, 3)}, Present(B, 1.0, -1.0), 3, 11.0),
        ({A: with_new(queue(1)), B: queue(2)}, Present(A, 3.0, 0.0), 9, 3.0 + 10 + 3 + 10 + 1),
        ({A: with_new(queue()), B: queue(1), C: queue(2)}, Present(B, 0.0, 0.0), 9, 10 + 3 + 10 + 3 + 10),
    ],
    ids=[
        "the present model's",
        "nobody else waits, so the quantum does not count",
        "nobody has the device",
        "behind what another one runs",
        "and what waits for it",
        "as much as fits its quantum",
        "or a batch",
        "or what it runs, when it has passed",
        "its own has passed, and somebody waits",
        "behind older ones of all others",
    ],
)
def test_when_a_request_starts(
    queues: dict[ModelId, Queue], present: Present, batch: int, expected: float
) -> None:
    """Estimates did not know of turns: who waited behind three quanta was told milliseconds."""
    assert starts_in(queues, present, 20.0, batch, A) == pytest.approx(expected)
