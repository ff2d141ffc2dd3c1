"""Who has a device to itself."""

from __future__ import annotations

from prism.types import ModelId
from prism.worker.timeshare import Choice, Contender, decide

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
