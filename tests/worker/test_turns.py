from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prism.costs import StepCosts
from prism.types import ModelId
from prism.worker.snapshot import Arrival, Runnable, TurnSnapshot
from prism.worker.turns import LEAST_CHUNK, MARGIN, SHARED_CHUNK, Turn, decide, decide_early

A, B = ModelId("a"), ModelId("b")
COSTS = StepCosts(((1, 0.004), (128, 0.005), (8192, 0.2)), 1e-9, 3e-8)


def prompting(model: ModelId, deadline: float, **values: Any) -> Runnable:
    return Runnable(model, deadline, 0.0, 0, **({"prompt_tokens": 5000, "costs": COSTS} | values))


def decoding(model: ModelId, due: float, last_turn: float = 0.0, **values: Any) -> Runnable:
    return Runnable(model, due, last_turn, 2, due, COSTS.decode(2, 1000), costs=COSTS, **values)


def test_nothing_to_do() -> None:
    assert decide(TurnSnapshot((), 2048), 0.0) is None


def test_earliest_deadline_first_and_whole_budget_when_nobody_decodes() -> None:
    assert decide(TurnSnapshot((prompting(B, 2.0), prompting(A, 1.0)), 2048), 0.0) == Turn(A, 2048)


def test_a_decode_that_is_due_goes_before_a_prompt() -> None:
    turn = decide(TurnSnapshot((prompting(A, 0.5), decoding(B, 0.007)), 2048), 0.0)
    assert turn is not None and turn.model == B


def test_a_stream_that_is_ahead_keeps_no_prompt_waiting() -> None:
    """A prompt waited for its own deadline, two seconds, while a stream ran far ahead of its objective."""
    turn = decide(TurnSnapshot((prompting(A, 2.0), decoding(B, 0.2)), 2048), 0.0)
    assert turn is not None and turn.model == A and turn.budget > 1000


@given(st.floats(0.03, 0.5), st.integers(0, 4000), st.booleans())
def test_a_chunk_leaves_time_for_the_decode_that_is_due(due: float, start: int, is_neighbour: bool) -> None:
    """Wherever it runs: the largest chunk after which the decode still meets its deadline."""
    prompt, other = prompting(A, 0.01, prompt_start=start), decoding(B, due)
    groups = ((prompt,), (other,)) if is_neighbour else ((prompt, other), ())
    turn = decide(TurnSnapshot(groups[0], 8192, groups[1]), 0.0)
    assert turn is not None and turn.model == A
    slack = MARGIN * (due - other.decode_seconds)
    if turn.budget > LEAST_CHUNK:
        assert COSTS.prefill(turn.budget, start) <= slack
    assert COSTS.prefill(turn.budget + 1, start) > slack or turn.budget == 8192


def test_decodes_of_its_own_model_bound_a_chunk_too() -> None:
    mixed = decoding(A, 0.05, prompt_tokens=4000)
    turn = decide(TurnSnapshot((mixed,), 8192), 0.0)
    assert turn is not None and LEAST_CHUNK < turn.budget < 4000
    assert COSTS.prefill(turn.budget - 2) + mixed.decode_seconds <= 0.05


def test_prompts_go_on_while_decodes_are_late() -> None:
    turn = decide(TurnSnapshot((prompting(A, 1.0), decoding(B, 2.0, last_turn=9.0)), 8192), 10.0)
    assert turn == Turn(A, LEAST_CHUNK)


def test_several_decodes_that_are_due_add_up() -> None:
    one = decide(TurnSnapshot((prompting(A, 0.01), decoding(B, 0.1)), 8192), 0.0)
    others = [decoding(ModelId(f"m{i}"), 0.1) for i in range(5)]
    many = decide(TurnSnapshot((prompting(A, 0.01), *others), 8192), 0.0)
    assert one is not None and many is not None and many.budget < one.budget


def test_ties_go_to_the_one_that_waited_longest() -> None:
    turn = decide(TurnSnapshot((decoding(A, 1.0, 5.0), decoding(B, 1.0, 4.0)), 2048), 0.0)
    assert turn is not None and turn.model == B


def test_late_prompts_do_not_starve_a_neighbour_that_decodes() -> None:
    """A burst of late prompts on one model kept another's stream without a token for 3.4 s."""
    burst = Runnable(A, 1.0, last_turn=49.9, num_decodes=0, prompt_tokens=9000, costs=COSTS)
    turn = decide(TurnSnapshot((burst, decoding(B, 49.0, last_turn=48.8)), 2048), 50.0)
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
