from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from prism.types import ModelId, ModelState, RequestId
from prism.worker.admission import LATE_PART, LATE_SHARE, AdmissionDecision, Admit, Expire, decide
from prism.worker.snapshot import AdmissionSnapshot, ModelLoad, WaitingRequest

A, B = ModelId("a"), ModelId("b")


def waiting(name: str, **values: Any) -> WaitingRequest:
    defaults = {
        "request_id": RequestId(name),
        "model": A,
        "arrival": 0.0,
        "deadline": 1.0,
        "expires": 60.0,
        "num_sequences": 1,
        "num_blocks": 1,
        "alone": False,
    }
    return WaitingRequest(**(defaults | values))


def load(model: ModelId, **values: Any) -> ModelLoad:
    defaults = {
        "model": model,
        "state": ModelState.ACTIVE,
        "num_sequences": 0,
        "max_sequences": 8,
        "num_blocks": 0,
        "num_slabs": 100,
        "blocks_per_slab": 1,
    }
    return ModelLoad(**(defaults | values))


def snapshot(*requests: WaitingRequest, running: int = 0, alone: bool = False, **a: Any) -> AdmissionSnapshot:
    return AdmissionSnapshot(requests, {A: load(A, **a), B: load(B)}, running, alone)


def decisions(snap: AdmissionSnapshot, now: float) -> tuple[AdmissionDecision, ...]:
    return decide(snap, now).decisions


def test_earliest_deadline_enters_first() -> None:
    later, sooner = waiting("later", deadline=3.0), waiting("sooner", deadline=2.0)
    assert decisions(snapshot(later, sooner), 0.0) == (Admit(sooner.request_id), Admit(later.request_id))


def test_expired_requests_are_refused() -> None:
    assert decisions(snapshot(waiting("r", expires=5.0)), 5.0) == (Expire(RequestId("r")),)


def test_requests_wait_for_their_model() -> None:
    assert decisions(snapshot(waiting("r"), state=ModelState.LOADING), 0.0) == ()


def test_a_large_request_is_not_overtaken_in_its_model_only() -> None:
    large = waiting("large", deadline=1.0, num_blocks=50)
    small = waiting("small", deadline=2.0)
    other = waiting("other", deadline=3.0, model=B)
    taken = decisions(snapshot(large, small, other, num_sequences=1, num_slabs=10), 0.0)
    assert taken == (Admit(RequestId("other")),)


def test_an_idle_model_always_takes_one() -> None:
    large = waiting("large", num_blocks=5000)
    assert decisions(snapshot(large, num_slabs=0), 0.0) == (Admit(large.request_id),)


def test_memory_that_two_models_could_get_is_given_to_one() -> None:
    """Each of them counted all that was free, and both lacked it later."""
    first, second = waiting("first", deadline=1.0, num_blocks=60), waiting("second", deadline=2.0, model=B)
    second = replace(second, num_blocks=60)
    busy = {"num_sequences": 1, "num_slabs": 10, "blocks_per_slab": 10}
    loads = {A: load(A, **busy), B: load(B, **busy)}
    both = AdmissionSnapshot((first, second), loads, 2, False)
    assert decisions(both, 0.0) == (Admit(first.request_id),)
    loads[B] = load(B, **busy | {"num_blocks": 20})  # blocks of its own, and four slabs that are left
    assert len(decisions(AdmissionSnapshot((first, second), loads, 2, False), 0.0)) == 2


def test_what_runs_is_expected_to_grow() -> None:
    new = waiting("new", num_blocks=50)
    growing = {"num_sequences": 3, "num_slabs": 10, "blocks_per_slab": 10}
    assert decisions(snapshot(new, **growing), 0.0) == (Admit(new.request_id),)
    assert decisions(snapshot(new, **growing, num_blocks_to_come=60), 0.0) == ()


def test_a_stuck_model_takes_one() -> None:
    """The oldest request waited for young ones of its model, and they for memory that only it could get."""
    old = waiting("old", num_blocks=50)
    full = {"num_sequences": 8, "num_slabs": 0}
    assert decisions(snapshot(old, **full), 0.0) == ()
    stuck = {"stuck": (1.0, RequestId("first"), 0)}
    assert decisions(snapshot(old, **full, **stuck), 0.0) == (Admit(old.request_id),)


def test_a_stuck_model_takes_none_that_is_younger() -> None:
    """Each arrival let another one in: all its queue stood in the engine, where nobody is refused in time."""
    stuck = {"num_sequences": 8, "num_slabs": 0, "stuck": (1.0, RequestId("first"), 0)}
    young, old = waiting("young", arrival=2.0, deadline=3.0), waiting("old", arrival=0.5, deadline=4.0)
    assert decisions(snapshot(young, **stuck), 2.0) == ()
    assert decisions(snapshot(young, old, **stuck), 2.0) == (Admit(old.request_id),), (
        "it stands behind the young one"
    )


def test_a_suspect_runs_alone() -> None:
    suspect, other = waiting("suspect", alone=True), waiting("other", model=B)
    assert decisions(snapshot(suspect, other, running=1), 0.0) == ()
    assert decisions(snapshot(suspect, other), 0.0) == (Admit(suspect.request_id),)
    assert decisions(snapshot(other, running=1, alone=True), 0.0) == ()


def test_batch_size_bounds_what_enters() -> None:
    requests = [waiting(str(i)) for i in range(5)]
    assert len(decisions(snapshot(*requests, num_sequences=6), 0.0)) == 2


def test_what_cannot_be_in_time_comes_behind() -> None:
    """One long prompt would have made two others late."""
    long = waiting("long", deadline=10.0, seconds=8.0)
    short = [waiting(f"s{i}", deadline=11.0 + i, seconds=3.0) for i in range(2)]
    assert decisions(snapshot(long, *short), 0.0) == (Admit(RequestId("s0")), Admit(RequestId("s1")))
    assert decisions(snapshot(long), 3.0) == (Admit(RequestId("long"), is_late=True),)


def test_late_ones_enter_when_engines_hold_nothing() -> None:
    """They filled the engines up to the horizon, and what came in time was computed behind them."""
    late = [waiting(f"l{i}", deadline=1.0, seconds=0.4) for i in range(3)]
    base = replace(snapshot(*late, num_sequences=1), horizon=10.0)
    assert decisions(base, 5.0) == (Admit(RequestId("l0"), is_late=True),), "one at a time"
    assert decisions(replace(base, busy=0.1), 5.0) == ()
    owed = replace(base, busy=0.1, owed_to_late=0.5)
    assert decisions(owed, 5.0) == (Admit(RequestId("l0"), is_late=True),), "its share is its own"


def test_late_ones_enter_in_groups_where_objectives_are_loose() -> None:
    """One by one a burst of them on a 1B had 0.81 of the tokens a second that it has in groups."""
    late = [waiting(f"l{i}", deadline=1.0, seconds=0.02) for i in range(9)]
    snap = replace(snapshot(*late, num_sequences=1), horizon=10.0, ttft=0.06 / LATE_PART)
    assert [len(decisions(replace(snap, busy=busy), 5.0)) for busy in (0.0, 0.03, 0.06)] == [3, 2, 0]
    idle = replace(snap, models={A: load(A, num_sequences=1), B: load(B)}, horizon=0.03)
    other = waiting("other", model=B, deadline=1.0, arrival=9.0, seconds=0.02)
    entered = decisions(replace(idle, waiting=(*late, other)), 5.0)
    assert len(entered) == 3 and entered[-1].request_id == "other", "no more than prompts in time"
    assert len(decisions(replace(snap, stretch=2.0), 5.0)) == 2, "decodes take half of the time"


def test_whoever_can_be_in_time_and_is_in_a_hurry_keeps_late_ones_out() -> None:
    """Not who is late in any case: one impossible objective would have slowed all of them down."""
    late = [waiting(f"l{i}", deadline=1.0, seconds=0.02) for i in range(9)]
    snap = replace(snapshot(*late, num_sequences=1), horizon=10.0, ttft=0.06 / LATE_PART)
    hasty = waiting("hasty", arrival=4.99, deadline=5.2, seconds=0.0)
    assert len(decisions(replace(snap, waiting=(*late, hasty)), 5.0)) == 2
    hopeless = replace(hasty, deadline=4.991)
    assert len(decisions(replace(snap, waiting=(*late, hopeless)), 5.0)) == 3


def test_engines_hold_no_more_than_the_horizon() -> None:
    requests = [waiting(str(i), deadline=9.0 + i, seconds=1.0) for i in range(5)]
    base = snapshot(*requests, num_sequences=1)
    assert len(decisions(replace(base, horizon=2.0), 0.0)) == 2
    assert len(decisions(replace(base, horizon=2.0, busy=1.5), 0.0)) == 1
    assert decisions(replace(base, horizon=2.0, busy=2.0), 0.0) == ()
    idle = replace(base, models={A: load(A), B: load(B)}, horizon=2.0, busy=2.0)
    assert len(decisions(idle, 0.0)) == 1, "an idle model always takes one"


def test_a_load_under_way_counts() -> None:
    """A request whose model will be there too late is late; one that can still be in time is not."""
    soon = waiting("soon", deadline=2.0, seconds=0.1, model=B)
    snap = snapshot(soon)
    for ready_in, is_late in ((1.5, False), (2.5, True)):
        models = {A: load(A), B: load(B, ready_in=ready_in, is_arriving=True)}
        assert decisions(replace(snap, models=models), 0.0) == (Admit(RequestId("soon"), is_late),)


def test_tenants_over_their_share_come_behind_those_within() -> None:
    greedy = [waiting(f"g{i}", deadline=1.0, seconds=0.3, tenant="greedy") for i in range(2)]
    modest = waiting("m", deadline=2.0, seconds=0.4, tenant="modest")
    snap = replace(snapshot(*greedy, modest), over_share=frozenset({"greedy"}))
    names = [d.request_id for d in decisions(snap, 0.0) if isinstance(d, Admit)]
    assert names == ["m", "g0", "g1"]


@given(st.integers(0, 10_000), st.floats(0.5, 1.5))
def test_nobody_starves(seed: int, pressure: float) -> None:
    """However many requests in time keep coming, a late one enters when its share has sufficed."""
    rng = random.Random(seed)
    late = [waiting(f"late{i}", arrival=-100.0 + i, deadline=-90.0, seconds=0.5) for i in range(5)]
    now, owed, queue, entered = 0.0, 0.0, list(late), {}
    bound = sum(r.seconds * (1 + 1 / LATE_SHARE) + 1.0 for r in late) + 5.0  # 1.0: the longest prompt
    count = 0
    while len(entered) < len(late):
        while rng.random() < pressure / (1 + pressure):
            count += 1
            queue.append(
                waiting(f"new{count}", arrival=now, deadline=now + 3.0, seconds=rng.uniform(0.1, 1.0))
            )
        snap = replace(snapshot(*queue, num_sequences=1), horizon=1e-9, owed_to_late=owed)
        chosen, owed = decide(snap, now)
        for decision in chosen:
            assert isinstance(decision, Admit)
            request = next(r for r in queue if r.request_id == decision.request_id)
            queue.remove(request)
            now += request.seconds
            if request in late:
                entered[request.request_id] = now
        if not chosen:
            now += 0.01
        assert now < bound, "a late request starves"
    assert list(entered) == sorted(entered), "the oldest first"


def test_a_full_decision_over_ten_thousand_is_quick() -> None:
    """Taken on arrivals and completions; the goal is 15 ms, here with room for a slow or busy machine.

    Time of this process, the best of several: what else the machine does counts less.
    """
    rng = random.Random(1)
    requests = [
        waiting(str(i), arrival=i * 1e-3, deadline=rng.uniform(0, 20), seconds=rng.uniform(0.001, 0.1))
        for i in range(10_000)
    ]
    snap = replace(snapshot(*requests, num_sequences=1), horizon=0.5)
    times = []
    for _ in range(7):
        begin = time.process_time()
        decide(snap, 0.0)
        times.append(time.process_time() - begin)
    assert min(times) < 0.1, f"{min(times):.4f} s"


def test_a_model_on_its_way_in_takes_requests_once_its_first_step_can_follow() -> None:
    request = waiting("r")
    assert decisions(snapshot(request, state=ModelState.LOADING), 0.0) == ()
    arriving = snapshot(request, state=ModelState.LOADING, is_arriving=True)
    assert decisions(arriving, 0.0) == (Admit(RequestId("r")),)


def test_a_suspect_waits_for_a_whole_model() -> None:
    """Alone means that nothing else is on the device, a copy of weights least of all."""
    arriving = snapshot(waiting("r", alone=True), state=ModelState.LOADING, is_arriving=True)
    assert decisions(arriving, 0.0) == ()
