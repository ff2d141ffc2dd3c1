from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prism.costs import StepCosts
from prism.types import ModelId
from prism.worker.snapshot import Arrival, Runnable, TurnSnapshot
from prism.worker.turns import (
    DECODE_SHARE,
    LEAST_CHUNK,
    LEAST_READS,
    MARGIN,
    PATIENCE,
    SHARED_CHUNK,
    Turn,
    decide,
    decide_early,
    given_up,
)

A, B = ModelId("a"), ModelId("b")
COSTS = StepCosts(((1, 0.004), (128, 0.005), (8192, 0.2)), 1e-9, 3e-8)


def prompting(model: ModelId, deadline: float, **values: Any) -> Runnable:
    defaults = {"last_turn": 0.0, "prompt_tokens": 5000, "costs": COSTS, "prompt_deadline": deadline}
    return Runnable(model, deadline, num_decodes=0, **(defaults | values))


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
    assert turn is not None and turn.model == A
    assert_least(turn.budget)


def assert_least(chunk: int) -> None:
    """Steps of 128 tokens read all weights again for each 128: half as many tokens a second as large ones."""
    assert COSTS.prefill(chunk) <= LEAST_READS * COSTS.gemm(1) < COSTS.prefill(chunk + 1)
    assert chunk > LEAST_CHUNK


def test_late_decodes_keep_no_prompt_from_being_in_time() -> None:
    """Everything waited for streams that were late anyhow, and was late, too."""
    late = decoding(B, 1.0, last_turn=0.0)
    in_time = prompting(A, 12.0, last_turn=9.0)
    turn = decide(TurnSnapshot((in_time, late), 8192), 10.0)
    assert turn is not None and turn.model == A
    assert_least(turn.budget)
    assert decide(TurnSnapshot((in_time,), 8192, (late,)), 10.0) == turn, "on another lane neither"
    waited = replace(late, tpot=0.1)
    assert decide(TurnSnapshot((in_time, replace(waited, last_turn=9.3)), 8192), 10.0) == turn
    assert decide(TurnSnapshot((in_time, replace(waited, last_turn=9.1)), 8192), 10.0) == Turn(B, 8192)
    too_late = replace(in_time, prompt_deadline=9.0)
    assert decide(TurnSnapshot((too_late, late), 8192), 10.0) == Turn(B, 8192)


def streaming(name: str, share: float, num_decodes: int, tpot: float = 0.01, **values: Any) -> Runnable:
    """It needs that share of the lane's time; all of them are late."""
    return Runnable(ModelId(name), 0.0, 0.0, num_decodes, 0.0, share * tpot, tpot=tpot, **values)


shares = st.lists(
    st.tuples(st.floats(0.01, 1.0), st.integers(1, 20), st.floats(0.002, 0.05)), min_size=1, max_size=9
)


@given(shares)
def test_as_many_streams_are_kept_in_time_as_the_lane_has_time_for(many: list[Any]) -> None:
    models = [streaming(f"m{i}", *each) for i, each in enumerate(many)]
    lost = given_up(models)
    kept = [m for m in models if m.model not in lost]
    assert kept and (len(kept) == 1 or sum(map(share_of, kept)) <= DECODE_SHARE)
    dearest = max(share_of(m) / m.num_decodes for m in kept)
    for model in models:
        if model.model in lost and share_of(model) / model.num_decodes < dearest:
            before = sum(share_of(m) for m in kept if share_of(m) / m.num_decodes < dearest)
            assert before + share_of(model) > DECODE_SHARE, "it was given up for dearer ones"


def share_of(model: Runnable) -> float:
    return model.decode_seconds / model.tpot


def run_lane(models: list[Runnable], seconds: float, has_prompts: bool = False) -> dict[str, list[float]]:
    """When each model has had its steps, as the worker counts deadlines; prompts come without end."""
    now, ends = 0.0, {m.model: [0.0] for m in models}
    while now < seconds:
        asking = (prompting(A, now + 1.0, last_turn=now),) if has_prompts else ()
        turn = decide(TurnSnapshot((*models, *asking), 2048), now)
        assert turn is not None
        if turn.model == A:
            now += COSTS.prefill(turn.budget)
            continue
        place = next(i for i, m in enumerate(models) if m.model == turn.model)
        model = models[place]
        due = model.deadline + model.tpot
        end = now + model.decode_seconds
        models[place] = replace(model, deadline=due, decode_deadline=due, last_turn=now)
        now = end
        ends[turn.model].append(now)
    return ends  # type: ignore[return-value]


@given(shares, st.booleans())
def test_no_stream_waits_for_ever(many: list[Any], has_prompts: bool) -> None:
    """Until it is due all the same, then for one step of each of the others at most, and a running one."""
    models = [streaming(f"m{i}", *each) for i, each in enumerate(many)]
    steps = [m.decode_seconds for m in models]
    before = max(*steps, COSTS.prefill(2048))
    for model, ends in zip(models, run_lane(list(models), 2.0, has_prompts).values(), strict=True):
        longest = max(b - a for a, b in zip(ends, [*ends[1:], 2.0], strict=True))
        assert longest <= PATIENCE * model.tpot + sum(steps) + before + 1e-9


def test_a_lane_with_too_many_streams_keeps_some_in_time() -> None:
    """Eight models that each needed a quarter of a lane took turns, and none of them was in time."""
    models = [streaming(f"m{i}", 0.25, 2 + i) for i in range(8)]
    ends = run_lane(models, 20.0)
    in_time = [name for name, times in ends.items() if (times[-1] - times[0]) / (len(times) - 1) <= 0.0101]
    assert in_time == ["m5", "m6", "m7"], "those with the most streams"


def test_what_is_given_up_goes_on_with_its_prompts_and_in_spare_time() -> None:
    kept, lost = streaming("kept", 0.5, 9), streaming("lost", 0.5, 1)
    both = TurnSnapshot((kept, lost), 2048)
    assert decide(both, 0.001) == Turn(kept.model, 2048)
    ahead = replace(kept, deadline=1.0, decode_deadline=1.0)
    assert decide(TurnSnapshot((ahead, lost), 2048), 0.001) == Turn(lost.model, 2048)
    asked = replace(lost, prompt_tokens=50, prompt_deadline=0.0005, costs=COSTS)
    ahead = replace(kept, deadline=0.05, decode_deadline=0.05)
    turn = decide(TurnSnapshot((ahead, asked), 2048), 0.001)
    assert turn is not None and turn.model == lost.model


def test_several_decodes_that_are_due_add_up() -> None:
    one = decide(TurnSnapshot((prompting(A, 0.01), decoding(B, 0.1)), 8192), 0.0)
    others = [decoding(ModelId(f"m{i}"), 0.1) for i in range(5)]
    many = decide(TurnSnapshot((prompting(A, 0.01), *others), 8192), 0.0)
    assert one is not None and many is not None and many.budget < one.budget


FIXED = StepCosts(((1, 0.005), (256, 0.009), (512, 0.013), (8192, 0.173)), 1e-9, 3e-8)
"""5 ms, and a millisecond for 64 tokens up to 512, for 48 beyond."""


def shared(*prompts: int, costs: StepCosts = COSTS, **values: Any) -> int:
    """Tokens of the step of a model with these prompts."""
    runnable = prompting(A, 1.0, prompt_tokens=sum(prompts), prompts=prompts, costs=costs, **values)
    turn = decide(TurnSnapshot((runnable,), 2048), 0.0)
    assert turn is not None
    return turn.budget


def test_prompts_share_a_step_as_long_as_that_saves_time() -> None:
    """The first of several was told of its token only when the last had been computed, too."""
    assert shared(100, 100, 100, costs=FIXED) == 2048, "they mostly read weights"
    assert shared(1000, 900, 50, costs=FIXED) == 1000, "5 ms are saved of 24: the second waits for no less"
    assert shared(1000, costs=FIXED) == 2048
    assert shared(3000, 50, costs=FIXED) == 2048, "a part of the first"


def test_no_prompt_is_cut_where_whole_ones_fill_a_step() -> None:
    """What was left of it took a step of its own, with another reading of the weights."""
    prompt = prompting(A, 1.0, prompt_tokens=1200, prompts=(300, 300, 300, 300), costs=FIXED)
    late = decoding(B, 1.0, last_turn=9.9)
    turn = decide(TurnSnapshot((replace(prompt, prompt_deadline=12.0, deadline=12.0), late), 2048), 10.0)
    least = FIXED.tokens_within(LEAST_READS * FIXED.gemm(1))
    assert 600 < least < 900
    assert turn == Turn(A, 600)


def test_ties_go_to_the_one_that_waited_longest() -> None:
    turn = decide(TurnSnapshot((decoding(A, 1.0, 5.0), decoding(B, 1.0, 4.0)), 2048), 0.0)
    assert turn is not None and turn.model == B


def test_late_prompts_do_not_starve_a_neighbour_that_decodes() -> None:
    """A burst of late prompts on one model kept another's stream without a token for 3.4 s."""
    burst = prompting(A, 1.0, last_turn=49.9, prompt_tokens=9000)
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
