from __future__ import annotations

from prism.types import ModelId
from prism.worker.snapshot import Runnable, TurnSnapshot
from prism.worker.turns import SHARED_CHUNK, Turn, decide

A, B = ModelId("a"), ModelId("b")


def test_nothing_to_do() -> None:
    assert decide(TurnSnapshot((), 2048)) is None


def test_earliest_deadline_first_and_whole_budget_when_alone() -> None:
    a = Runnable(A, 1.0, 0.0, 0, has_prompts=True)
    b = Runnable(B, 2.0, 0.0, 0, has_prompts=True)
    assert decide(TurnSnapshot((b, a), 2048)) == Turn(A, 2048)


def test_prompts_leave_time_to_others_that_decode() -> None:
    a = Runnable(A, 1.0, 0.0, 3, has_prompts=True)
    b = Runnable(B, 2.0, 0.0, 1, has_prompts=False)
    assert decide(TurnSnapshot((a, b), 2048)) == Turn(A, SHARED_CHUNK + 3)


def test_ties_go_to_the_one_that_waited_longest() -> None:
    a = Runnable(A, 1.0, 5.0, 1, has_prompts=False)
    b = Runnable(B, 1.0, 4.0, 1, has_prompts=False)
    turn = decide(TurnSnapshot((a, b), 2048))
    assert turn is not None and turn.model == B
