"""A simulated device: many steps at once give what single steps give, and every request ends once."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.modes import Mode
from prism.sim.device import SimDevice
from prism.sim.jobs import End
from prism.sim.rounds import LEAD
from prism.sim.ticks import NEVER, to_ticks
from tests.sim.random_loads import deal_with, jobs, models, requests, run, serve

MODES = st.sampled_from(list(Mode))
WAITS = st.sampled_from([0.02, 0.1, 0.5, 2.0])


@given(MODES, models, requests, st.integers(1, 3), st.integers(0, 12), WAITS, st.booleans(), st.booleans())
@settings(max_examples=150)
def test_jumping_equals_stepping(
    mode: Mode,
    shapes: list[Any],
    asked: list[Any],
    lanes: int,
    slabs: int,
    wait: float,
    is_ahead: bool,
    is_queueing: bool,
) -> None:
    """To the picosecond, in every mode, with memory short and models coming and going."""
    options = {"max_wait": wait, "load_ahead": is_ahead, "is_queueing": is_queueing}
    _check_jumping(mode, shapes, asked, lanes, slabs, options)


def _check_jumping(
    mode: Mode, shapes: list[Any], asked: list[Any], lanes: int, slabs: int, options: dict[str, Any]
) -> None:
    jumped, stepped = (
        serve(mode, shapes, asked, lanes, slabs, is_stepping=flag, **options) for flag in (False, True)
    )
    assert [_story(job) for job in jumped] == [_story(job) for job in stepped]


large = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.sampled_from([16384, 65536]),
        st.floats(1e-4, 5e-3),
        st.sampled_from([0.0, 1e-8, 1e-6]),
        st.sampled_from([1e-3, 5e-3, 2e-2]),
    ),
    min_size=1,
    max_size=4,
)
"""Models of which a slab holds 32 or 128 tokens."""
long_requests = st.lists(
    st.tuples(st.floats(0, 1.0), st.integers(0, 4), st.integers(1, 200), st.integers(60, 380)),
    min_size=1,
    max_size=16,
)


@given(
    MODES, large, long_requests, st.integers(1, 3), st.integers(0, 60), WAITS, st.booleans(), st.booleans()
)
@settings(max_examples=100)
def test_jumping_equals_stepping_where_runs_take_slabs_on_their_way(
    mode: Mode,
    shapes: list[Any],
    asked: list[Any],
    lanes: int,
    slabs: int,
    wait: float,
    is_ahead: bool,
    is_queueing: bool,
) -> None:
    """Long answers, and from too little memory to enough of it: what a run counts on is taken by others."""
    options = {"max_wait": wait, "load_ahead": is_ahead, "is_queueing": is_queueing}
    _check_jumping(mode, shapes, asked, lanes, slabs, options)


def test_a_run_goes_no_further_than_the_blocks_that_are_left_to_it() -> None:
    """It counted on empty slabs that go back when a request of its model ends."""
    device = run(Mode.PRISM, [(1, 16384, 1e-3, 0.0, 1e-2)], [], 1, 20)
    (job,) = jobs(device, [(0.0, 0, 10, 380)])
    device.offer(job)
    device.run_until(to_ticks(0.05))
    (model,), (made,) = device.models.values(), device.stepper._runs
    assert made is not None and device.memory.take_free(model, 5 * model.blocks_per_slab, device.now)
    device.begin(device.now)
    device.stepper.disturb(model, device.now)
    device.poke()
    device.run_until(to_ticks(0.05))
    before = device.stepper._runs[0]
    assert before is not None and before.promised == 0
    num_steps, num_blocks = before.rounds.num_steps, model.free_blocks
    device.begin(device.now)
    device.memory.trim(model)  # all but one, as when another request of it has ended
    assert before.rounds.num_steps < num_steps and 0 <= model.free_blocks < num_blocks
    while (time := device.next_event()) < NEVER:
        device.run_until(time + 1)
        device.check()
    assert job.produced == 380


def test_streams_that_are_late_take_turns_by_how_long_they_have_waited() -> None:
    """Not by how late they are: that holds where the policy is asked, and where lanes go on without it."""
    shapes = [(1, 1024, base, 0.0, 5e-3) for base in (2e-3, 4e-3, 1e-3)]
    shapes.append((1, 1024, 1e-3, 0.0, 2e-2))
    asked = [(0.0, 4, 9, 299), (0.2, 0, 85, 353), (0.3, 1, 10, 189), (1.0, 3, 92, 275)]
    jumped, stepped = (serve(Mode.PRISM, shapes, asked, 2, 200, is_stepping=flag) for flag in (False, True))
    assert [_story(job) for job in jumped] == [_story(job) for job in stepped]


def test_free_slabs_that_a_run_needs_are_no_events() -> None:
    """380 tokens fill 12 slabs. Each of them ended the run, and the device was looked at from all sides."""
    device = run(Mode.PRISM, [(1, 65536, 1e-3, 1e-8, 5e-3)], [], 2, 20)
    (job,) = made = jobs(device, [(0.0, 0, 10, 380)])
    deal_with(device, made)
    assert job.end is End.SERVED
    assert device.num_events == 4  # it comes, its model has come, its last step closes, it ends


def test_a_run_goes_without_the_slabs_that_others_take() -> None:
    """The second model takes what the first one's run was going to, and both end as if step by step."""
    shapes = [(1, 65536, 1e-3, 1e-8, 5e-3)] * 2
    asked = [(0.0, 0, 10, 380), (0.1, 1, 190, 200), (0.2, 1, 150, 200)]
    jumped, stepped = (serve(Mode.PRISM, shapes, asked, 2, 18, is_stepping=flag) for flag in (False, True))
    assert [_story(job) for job in jumped] == [_story(job) for job in stepped]
    assert any(job.num_restarts for job in jumped)


@pytest.mark.parametrize("num_models", [1, 2])
def test_streams_that_go_on_are_looked_at_by_themselves(
    num_models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models decode in turns of some steps each: the whole device was looked at when each turn ended."""
    asked: list[int] = []
    decide = SimDevice._decide

    def counted(device: SimDevice, now: int) -> None:
        asked.append(now)
        decide(device, now)

    monkeypatch.setattr(SimDevice, "_decide", counted)
    shapes = [(1, 1024, 1e-3, 1e-8, tpot) for tpot in (20e-3, 6e-3)][:num_models]
    device = run(Mode.PRISM, shapes, [], 1, 20)
    made = jobs(device, [(0.0, index, 4, 300) for index in range(num_models)])
    deal_with(device, made)
    assert all(job.end is End.SERVED for job in made)
    assert len(asked) <= 8 * num_models
    assert num_models == 1 or device.num_events > 3 * len(asked)


def _story(job: Any) -> tuple[Any, ...]:
    return (job.request_id, job.end, job.first_token, job.last_token, job.end_time, job.num_restarts)


@given(MODES, models, requests, st.integers(1, 3), st.integers(0, 12), WAITS)
@settings(max_examples=100)
def test_every_request_ends_once(
    mode: Mode, shapes: list[Any], asked: list[Any], lanes: int, slabs: int, wait: float
) -> None:
    """`Job.finish` asserts that it is the first end; here that there is one, and that it makes sense."""
    for job in serve(mode, shapes, asked, lanes, slabs, max_wait=wait):
        assert job.end is not None
        if job.end is End.SERVED:
            assert job.first_token is not None and job.arrival < job.first_token <= job.last_token
            assert job.produced == job.output
        if job.end is End.EXPIRED:
            assert job.first_token is None and job.end_time >= job.arrival


SMALL = [(1, 1024, 1e-3, 1e-8, 5e-3)]


@pytest.mark.parametrize("mode", list(Mode))
def test_one_request_alone(mode: Mode) -> None:
    """It takes what the cost model says: activation where there is one, prompt, then its tokens."""
    (job,) = serve(mode, SMALL, [(0.5, 0, 64, 11)], 1, 8)
    activation = 0.0 if mode in (Mode.STATIC, Mode.ELASTIC) else 0.01 + (2 << 20) / 1e9
    prompt = 2e-3 + 1e-8 * 64 * 32
    assert job.first_token is not None
    assert job.first_token / 1e12 == pytest.approx(0.5 + activation + prompt)
    decodes = sum(1e-3 + 1e-8 * (65 + i) for i in range(10))
    assert (job.last_token - job.first_token) / 1e12 == pytest.approx(decodes)


def test_what_has_come_ahead_waits_for_nothing_and_gives_way() -> None:
    """Two models on a device that holds one of them, and without room to spare none comes by itself."""
    shapes = [(4, 1024, 1e-3, 0.0, 5e-3), (4, 1024, 1e-3, 0.0, 5e-3)]
    asked = [(0.5, 0, 64, 3), (0.9, 1, 64, 3)]
    waits = {
        slabs: [to_wait(job) for job in serve(Mode.PRISM, shapes, asked, 1, slabs, load_ahead=True)]
        for slabs in (0, 2, 10)
    }
    activation = 0.01 + 4 * (2 << 20) / 1e9
    assert waits[0] == pytest.approx([2e-3 + activation] * 2, rel=0.02)
    assert waits[2] == pytest.approx([2e-3, 2e-3 + activation], rel=0.02)
    assert waits[10] == pytest.approx([2e-3] * 2, rel=0.02)


def to_wait(job: Any) -> float:
    assert job.end is End.SERVED
    return float(job.first_token - job.arrival) / 1e12


@pytest.mark.parametrize(("lanes", "which"), [(1, 0), (1, 1), (2, 1)])
def test_a_prompt_waits_for_the_present_step_and_for_one_that_is_queued(lanes: int, which: int) -> None:
    """Of its own lane, whatever the model, and of others: one is, for the last `LEAD` of each step."""
    shapes = [(1, 1024, 5e-3, 0.0, 1.0), (1, 1024, 5e-3, 0.0, 1.0)]
    more = []
    for tenth in range(50):
        asked = [(0.0, 0, 1, 60), (0.12 + tenth * 1e-4, which, 1, 1)]
        queued, not_queued = (
            to_wait(serve(Mode.STATIC, shapes, asked, lanes, 8, is_queueing=flag)[1])
            for flag in (True, False)
        )
        assert 5e-3 < not_queued < 10e-3 + 1e-4
        more.append(round((queued - not_queued) / 5e-3, 3))
    assert set(more) == {0.0, 1.0} and sum(more) == 15 == LEAD / 1e8


def test_decodes_that_are_chosen_behind_a_prompt_begin_when_it_has_run() -> None:
    """A lane goes on to choose steps while a prompt of another one has the device."""
    shapes = [(1, 1024, 1e-3, 0.0, 1.0), (1, 1024, 20e-3, 0.0, 1.0)]
    asked = [(0.0, 0, 1, 30), (0.0052, 1, 1, 1), (0.0101, 0, 1, 1)]
    first, prompt, last = serve(Mode.STATIC, shapes, asked, 2, 8)
    assert prompt.first_token is not None and last.first_token is not None
    assert first.last_token > prompt.first_token > 20e9
    steps = (last.first_token - prompt.first_token) / 1e12
    assert steps == pytest.approx(2e-3, rel=0.2), "one step was queued when it came, and its own is second"


def test_a_request_keeps_its_place_until_its_last_token_has_come() -> None:
    """Its last step is on its way when the next one is chosen: that has nobody else in its place."""
    shapes = [(1, 1024, 1e-3, 0.0, 1.0)]
    first, second = serve(Mode.STATIC, shapes, [(0.0, 0, 1, 20), (0.001, 0, 1, 2)], 1, 8, max_batch_size=1)
    assert first.end_time == first.last_token < second.first_token
    assert (second.first_token - first.last_token) / 1e12 == pytest.approx(1e-3, rel=0.2)


def test_turns_go_by_what_streams_are_ahead() -> None:
    """Of two streams on a lane that has time for both, the one of the looser objective just keeps it.

    Deadlines were thought to count from the last token on, whatever came early before.
    """
    shapes = [(1, 1024, 1e-3, 0.0, 20e-3), (1, 1024, 1e-3, 0.0, 6e-3)]
    slow, quick = serve(Mode.PRISM, shapes, [(0.0, 0, 1, 40), (0.0, 1, 1, 900)], 1, 16)
    pace = [(job.last_token - job.first_token) / 1e12 / (job.output - 1) for job in (slow, quick)]
    ahead = 8 * 6e-3  # in the end, as the other one is all along
    assert pace[0] == pytest.approx((39 * 20e-3 - ahead) / 39, rel=0.01)
    assert pace[1] < 1.1e-3


def test_two_lanes_overlap() -> None:
    """Each step takes longer while the other lane decodes, but both together are quicker than one lane."""
    shapes = [(1, 1024, 1e-3, 0.0, 5e-3)] * 2
    asked = [(0.0, 0, 1, 101), (0.0, 1, 1, 101)]
    ends = {n: max(job.last_token for job in serve(Mode.STATIC, shapes, asked, n, 8)) / 1e12 for n in (1, 2)}
    assert ends[1] == pytest.approx(0.202, rel=0.01)
    assert ends[2] == pytest.approx(0.202 / 1.2, rel=0.03)


def test_a_model_that_nobody_asks_gives_way() -> None:
    """`prism` on a device that holds one of two models at a time."""
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3)] * 2
    served = serve(Mode.PRISM, shapes, [(0.0, 0, 10, 10), (0.5, 1, 10, 10), (0.9, 0, 10, 10)], 2, 0)
    assert [job.end for job in served] == [End.SERVED] * 3


def test_the_end_of_prompts_lets_those_in_who_wait_for_it() -> None:
    """Their prompts fill what engines may hold until then; where nobody waits it is no event."""
    shapes = [(1, 1024, 5e-3, 0.0, 5e-2)]
    asked = [(0.0, 0, 64, 200), (0.011, 0, 64, 200), (0.0111, 0, 64, 200), (0.0112, 0, 64, 200)]
    first, *others = serve(Mode.PRISM, shapes, asked, 1, 4, horizon=0.005)
    assert first.last_token > 1e12
    for job in others:
        assert job.first_token is not None and job.first_token < 0.1e12


def test_a_request_that_lost_its_place_does_not_expire() -> None:
    """The clock stood still at the time at which it would have been refused, had it not started."""
    shapes = [(6, 1024, 2e-3, 0.0, 1e-2)] * 2
    asked = [
        (0.0, 0, 10, 150),
        (0.05, 1, 10, 350),
        (0.06, 0, 10, 380),
    ]  # the last one is evicted for the second
    served = serve(Mode.PRISM, shapes, asked, 1, 0, max_wait=0.7)
    assert [job.end for job in served] == [End.SERVED] * 3
    assert served[2].num_restarts and served[2].last_token > 0.8e12


def test_two_models_that_both_lack_memory_do_not_take_it_from_each_other_for_ever() -> None:
    """Both planned at the same moment, and each gave up its plan for the other's: the clock stood still."""
    random = Random(1_000_627)
    for _ in range(40):
        shapes = [(1, 16384, random.uniform(1e-3, 5e-3), 1e-8, 5e-3) for _ in range(2)]
        asked = [(i / 50, i, random.randint(50, 200), 120) for i in range(14)]
        for job in serve(Mode.ELASTIC, shapes, asked, 2, 6):
            assert job.end is not None


def test_the_longest_life_ends_what_runs_and_what_waits() -> None:
    shapes = [(6, 1024, 1e-3, 0.0, 5e-3)] * 2
    asked = [(0.0, 0, 10, 300), (0.01, 1, 10, 300), (0.02, 0, 10, 20)]
    served = serve(Mode.PRISM, shapes, asked, 1, 0, request_timeout=0.2)
    assert [job.end for job in served] == [End.TIMED_OUT, End.TIMED_OUT, End.SERVED]
    assert served[0].end_time == 0.2e12


def test_too_long_for_its_share() -> None:
    shapes = [(1, 16384, 1e-3, 0.0, 5e-3)]
    (job,) = serve(Mode.STATIC, shapes, [(0.0, 0, 200, 400)], 1, 0)
    assert job.end is End.TOO_LONG


def test_a_busy_model_leaves_when_its_time_has_passed_and_not_at_the_next_event() -> None:
    """`now - active_since` was less than `min_residency` by a rounding, and nobody looked again."""
    shapes = [(6, 1024, 5e-3, 0.0, 1e-1)] * 2
    asked = [(3.3, 0, 10, 2), (3.301, 1, 10, 2), (3.302, 0, 10, 390)]
    for thousandth in range(60, 100):
        first, second, third = serve(Mode.PRISM, shapes, asked, 1, 0, min_residency=thousandth / 100)
        assert first.end is second.end is third.end is End.SERVED
        assert second.end_time < third.end_time, thousandth
