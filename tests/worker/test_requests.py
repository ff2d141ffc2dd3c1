"""What the loop asks at each round is known without looking at every request."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prism.messages import Submit
from prism.types import GatewayId, ModelId, SamplingParams, Slo
from prism.worker.earliest import Earliest
from prism.worker.requests import Requests, Ticket, got_tokens

A, B = ModelId("a"), ModelId("b")


def ticket(name: str, model: str = A, arrival: float = 0.0, latest_end: float = 100.0) -> Ticket:
    submit = Submit(
        request_id=name,
        attempt=0,
        model=model,
        prompt=[1],
        params=SamplingParams(max_tokens=1, seed=0),
        slo=Slo(1.0, 0.25),
        arrival=arrival,
        latest_end=latest_end,
    )
    return Ticket(submit, GatewayId("g"), 50.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=200))
def test_the_least_of_what_is_there(actions: list[tuple[bool, int]]) -> None:
    earliest: Earliest[tuple[int]] = Earliest()
    keys: set[tuple[int]] = set()
    for adds, number in actions:
        if adds and (number,) not in keys:
            keys.add((number,))
            earliest.add((number,))
        elif not adds and (number,) in keys:
            keys.remove((number,))
            earliest.remove((number,))
        assert earliest.least == min(keys, default=None)


def test_what_has_gone_takes_no_memory() -> None:
    earliest: Earliest[tuple[int]] = Earliest()
    earliest.add((0,))
    for number in range(1, 1000):
        earliest.add((number,))
        earliest.remove((number,))
    assert len(earliest._heap) < 100 and earliest.least == (0,)


def test_who_waits_and_who_is_oldest() -> None:
    requests = Requests()
    old, young, other = ticket("y", arrival=1.0), ticket("x", arrival=2.0), ticket("z", B, arrival=0.5)
    for each in (young, old, other):
        requests.add(each)
    assert requests.oldest(A) == (1.0, "y", 0) and requests.oldest(B) == (0.5, "z", 0)
    assert requests.num_waiting == 3 and requests.has_waiting(A)
    requests.enter(old)
    requests.enter(young)
    assert requests.waiting == (other,) and not requests.has_waiting(A) and requests.has_any(A)
    requests.leave(young)
    assert not young.is_running and requests.has_waiting(A)
    requests.remove(old)
    assert requests.oldest(A) == (2.0, "x", 0)
    requests.remove(young)
    assert requests.oldest(A) is None and not requests.has_any(A) and requests.waiting == (other,)


def test_who_runs_and_who_expires_next() -> None:
    requests = Requests()
    first, second, started = ticket("x"), ticket("y"), ticket("z")
    first.expires, second.expires = 20.0, 10.0
    for each in (first, second):
        requests.add(each)
    assert requests.next_expiry == 10.0 and not requests.running_of(A)
    requests.enter(second)
    assert requests.next_expiry == 20.0 and list(requests.running_of(A)) == [second]
    second.is_started = True
    requests.leave(second)
    assert requests.next_expiry == 20.0, "what has started does not expire"
    requests.check()
    started.is_started, started.expires = True, 1.0
    requests.add(started)
    requests.remove(second)
    requests.remove(first)
    assert requests.next_expiry == float("inf")
    requests.enter(started)
    requests.remove(started)
    requests.check()
    assert not requests.running_of(A)


def test_overdue_requests_come_one_by_one() -> None:
    requests = Requests()
    for name, end in (("late", 9.0), ("later", 12.0), ("first", 3.0)):
        requests.add(ticket(name, latest_end=end))
    assert requests.latest_end == 3.0 and requests.overdue(2.9) is None
    gone = []
    while (overdue := requests.overdue(10.0)) is not None:
        gone.append(overdue.request_id)
        requests.remove(overdue)
    assert gone == ["first", "late"] and requests.latest_end == 12.0


def test_tokens_are_due_one_objective_apart_and_no_more_than_some_ahead() -> None:
    one = ticket("r")
    assert one.due == 1.0
    got_tokens([one], 0.5)
    assert one.due == 0.75
    got_tokens([one, one], 0.6)  # of two choices in one step
    assert one.due == 1.0
    for now in range(61, 100):
        got_tokens([one], now / 100)
    assert one.due == 0.99 + 8 * 0.25
