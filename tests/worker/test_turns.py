from __future__ import annotations

from dataclasses import replace

from prism.types import ModelId
from prism.worker.snapshot import Arrival, Runnable, TurnSnapshot
from prism.worker.turns import SHARED_CHUNK, Turn, decide, decide_early

A, B = ModelId("a"), ModelId("b")


def test_nothing_to_do() -> None:
    assert decide(TurnSnapshot((), 2048), 0.0) is None


def test_earliest_deadline_first_and_whole_budget_when_alone() -> None:
    a = Runnable(A, 1.0, 0.0, 0)
    b = Runnable(B, 2.0, 0.0, 0)
    assert decide(TurnSnapshot((b, a), 2048), 0.0) == Turn(A, 2048)


def test_prompts_leave_time_to_others_that_decode() -> None:
    a = Runnable(A, 1.0, 0.0, 3)
    b = Runnable(B, 2.0, 0.0, 1)
    assert decide(TurnSnapshot((a, b), 2048), 0.0) == Turn(A, SHARED_CHUNK + 3)


def test_ties_go_to_the_one_that_waited_longest() -> None:
    a = Runnable(A, 1.0, 5.0, 1)
    b = Runnable(B, 1.0, 4.0, 1)
    turn = decide(TurnSnapshot((a, b), 2048), 0.0)
    assert turn is not None and turn.model == B


def test_late_prompts_do_not_starve_a_neighbour_that_decodes() -> None:
    """A burst of late prompts on one model kept another's stream without a token for 3.4 s."""
    burst = Runnable(A, 1.0, last_turn=49.9, num_decodes=0)
    decoding = Runnable(B, 49.0, last_turn=48.8, num_decodes=1)
    turn = decide(TurnSnapshot((burst, decoding), 2048), 50.0)
    assert turn is not None and turn.model == B


ARRIVAL = Arrival(
    has_work=True,
    is_readable=True,
    has_stepped=False,
    is_cancelled=False,
    is_lane_taken=False,
    others_decode=False,
    max_batch_tokens=2048,
)


def test_a_model_on_its_way_in_has_one_step() -> None:
    assert decide_early(ARRIVAL) == 2048
    for reason in ("has_stepped", "is_cancelled", "is_lane_taken"):
        assert decide_early(replace(ARRIVAL, **{reason: True})) is None, reason
    for want in ("has_work", "is_readable"):
        assert decide_early(replace(ARRIVAL, **{want: False})) is None, want


def test_a_step_behind_the_copy_is_small_beside_neighbours() -> None:
    assert decide_early(replace(ARRIVAL, others_decode=True)) == SHARED_CHUNK
    assert decide_early(replace(ARRIVAL, others_decode=True, max_batch_tokens=100)) == 100
