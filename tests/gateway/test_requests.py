"""One request's state machine, and the dispatcher that owns all of them, under whatever may happen."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.errors import RequestError, Unavailable, WireError
from prism.gateway.dispatcher import Dispatcher
from prism.gateway.requests import (
    MAX_DEATHS,
    Accepted,
    Ending,
    Failed,
    Finished,
    Gap,
    Request,
    Stale,
)
from prism.messages import (
    CancelChoice,
    Output,
    Outputs,
    Rejected,
    Returned,
    Route,
    Routes,
    Started,
    Submit,
    Token,
)
from prism.types import FinishReason, ModelId, RequestId, SamplingParams, Slo
from tests.gateway.fakes import MODEL, FakeLinks, place, routes

W1, W2 = place(incarnation=1), place(incarnation=2)


def make_request(number: int = 0, n: int = 1, arrival: float = 0.0, **fields: Any) -> Request:
    return Request(
        request_id=RequestId(f"r{number}"),
        model=ModelId(MODEL),
        prompt=[1, 2, 3],
        params=SamplingParams(n=n, max_tokens=50, seed=1),
        slo=Slo(1.0, 0.1),
        arrival=arrival,
        latest_start=arrival + 60,
        latest_end=arrival + 600,
        **fields,
    )


def output(
    request: Request, index: int, tokens: list[int], finish: FinishReason | None = None, **fields: Any
) -> Output:
    fields = {"attempt": request.attempt, "choice": 0} | fields
    return Output(request_id=request.request_id, index=index, token_ids=tokens, finish=finish, **fields)


def test_tokens_are_accepted_once_and_in_order() -> None:
    request = make_request()
    request.submit_to(W1)
    assert request.accept(W1, output(request, 0, [5, 6])) == Accepted(0, [5, 6], None, None, None)
    assert request.accept(W1, output(request, 0, [5, 6])) == Stale()
    assert request.accept(W1, output(request, 1, [6, 7])) == Accepted(0, [7], None, None, None)
    assert isinstance(request.accept(W1, output(request, 5, [9])), Gap)
    assert isinstance(request.accept(W1, output(request, 0, [5], FinishReason.STOP)), Gap)
    assert isinstance(request.accept(W1, output(request, 3, [5], choice=1)), Gap)
    assert request.accept(W2, output(request, 3, [5])) == Stale()
    assert request.accept(W1, output(request, 3, [5], attempt=0)) == Stale()
    last = request.accept(W1, output(request, 3, [], FinishReason.STOP, stop_token=9))
    assert last == Accepted(0, [], None, FinishReason.STOP, 9)
    request.finish_choice(0)
    assert request.ending == Finished()
    assert request.accept(W1, output(request, 3, [5])) == Stale()


def test_a_resubmission_carries_what_there_is() -> None:
    request = make_request(n=3)
    request.submit_to(W1)
    request.accept(W1, output(request, 0, [5, 6]))
    request.accept(W1, output(request, 0, [7], FinishReason.STOP, choice=2))
    request.finish_choice(2)
    assert not request.lose()
    submit = request.submit_to(W2)
    assert submit.attempt == 2
    assert [(c.choice, c.token_ids, c.finished) for c in submit.resumed] == [
        (0, [5, 6], False),
        (2, [7], True),
    ]
    assert isinstance(request.accept(W2, output(request, 2, [8])), Accepted)


def test_three_deaths_without_progress_end_a_request() -> None:
    request = make_request()
    for number in range(3):
        submit = request.submit_to(W1)
        assert submit.alone == (number == 2)
        request.start(W1, request.attempt)
        assert request.lose() == (number == 2)
    assert isinstance(request.ending, Failed)
    assert request.ending.error.status == 500


def test_deaths_before_the_start_do_not_count() -> None:
    request = make_request()
    for _ in range(100):
        assert not request.submit_to(W1).alone
        assert not request.lose()
    assert request.ending is None


def test_progress_takes_the_suspicion_away_but_not_for_ever() -> None:
    request = make_request()
    for number in range(MAX_DEATHS + 1):
        assert request.ending is None
        assert not request.submit_to(W1).alone
        request.start(W1, request.attempt)
        request.accept(W1, output(request, number, [5]))
        request.lose()
    assert isinstance(request.ending, Failed)


SAYINGS = st.lists(
    st.tuples(
        st.sampled_from([W1, W1, W1, W2]),
        st.sampled_from([0, 0, 0, 0, -1, 1]),
        st.sampled_from([0, 0, 0, 1, 1, -1, 2]),
        st.none() | st.none() | st.integers(0, 3),
        st.sampled_from(["", "", "", "", "finish", "lose", "fail"]),
    ),
    max_size=25,
)


@given(SAYINGS)
def test_a_token_that_goes_on_is_one_that_is_accepted(sayings: list[tuple[Any, ...]]) -> None:
    """Whoever says it, of whatever attempt, about whatever choice and place; None is the next place."""
    short, long = make_request(0, n=2), make_request(0, n=2)
    for request in (short, long):
        request.submit_to(W1)
    for who, behind, choice, index, event in sayings:
        if index is None:
            index = len(long.choices[choice].token_ids) if 0 <= choice < 2 else 0
        if long.ending is None and event:
            for request in (short, long):
                if event == "finish" and not request.choices[0].is_finished:
                    request.finish_choice(0)
                elif event == "fail":
                    request.fail(WireError(status=500, type="x", message="x"))
                elif event == "lose":
                    request.lose()
                    if request.ending is None:
                        request.submit_to(W1)
        attempt = long.attempt + behind
        said = Output(request_id="r0", attempt=attempt, choice=choice, index=index, token_ids=[index])
        goes_on = short.goes_on(who, Token("r0", attempt, choice, index, index))
        answer = long.accept(who, said)
        assert isinstance(answer, Accepted) == goes_on
        if goes_on:
            assert answer == Accepted(choice, [index], None, None, None)
        else:
            assert short.accept(who, said) == answer
        names = ("choices", "is_started", "has_tokens", "strikes", "_progressed")
        assert all(getattr(short, name) == getattr(long, name) for name in names)


# --- the dispatcher -----------------------------------------------------------------------------------


class CountingSink:
    """Checks that news come in order and that the end comes once."""

    def __init__(self) -> None:
        self.tokens_of: dict[int, list[int]] = {}
        self.endings: list[Ending] = []
        self.stop_at: int | None = None

    def started(self, message: Started, now: float) -> None:
        assert not self.endings

    def token(self, choice: int, token: int, now: float) -> FinishReason | None:
        return self.tokens(Accepted(choice, [token], None, None, None), now)

    def tokens(self, accepted: Accepted, now: float) -> FinishReason | None:
        assert not self.endings
        known = self.tokens_of.setdefault(accepted.choice, [])
        known += accepted.token_ids
        if self.stop_at is not None and len(known) >= self.stop_at:
            return FinishReason.STOP
        return accepted.finish

    def resubmitted(self) -> None:
        assert not self.endings

    def ended(self, ending: Ending, now: float) -> None:
        self.endings.append(ending)


class Chaos:
    """Random events against a dispatcher; tokens of a choice are 0, 1, 2, ... so that tears would show."""

    def __init__(self) -> None:
        self.links = FakeLinks()
        self.dispatcher = Dispatcher(self.links, max_held=8)
        self.sinks: dict[str, CountingSink] = {}
        self.now = 0.0
        self.numbers = itertools.count()
        self.incarnations = {"w0": 1, "w1": 1}
        self.version = 0
        self.lengths: dict[str, int] = {}

    def open(self, n: int, length: int, stop_at: int | None) -> None:
        request = make_request(next(self.numbers), n, arrival=self.now)
        sink = CountingSink()
        sink.stop_at = stop_at
        try:
            self.dispatcher.open(request, sink, self.now)
        except RequestError:
            return
        self.sinks[request.request_id] = sink
        self.lengths[request.request_id] = length

    def up(self, worker: str) -> None:
        self.dispatcher.on_worker_up(place(worker, self.incarnations[worker]), self.now)

    def end(self, worker: str) -> None:
        self.dispatcher.on_worker_ended(place(worker, self.incarnations[worker]), self.now)
        self.incarnations[worker] += 1

    def route(self, workers: list[str]) -> None:
        self.version += 1
        self.dispatcher.on_routes(routes(*workers, version=self.version), self.now)

    def submit_of(self, pick: int) -> tuple[Any, Submit] | None:
        submits = [(where, m) for where, m in self.links.sent if isinstance(m, Submit)]
        return submits[pick % len(submits)] if submits else None

    def start(self, pick: int) -> None:
        if (found := self.submit_of(pick)) is not None:
            where, submit = found
            started = Started(
                request_id=submit.request_id,
                attempt=submit.attempt,
                incarnation=where.incarnation,
                queue_seconds=0,
                cached_tokens=0,
            )
            self.dispatcher.on_started(where, started, self.now)

    def token(self, pick: int, choice: int, index: int, count: int) -> None:
        """Any submission may speak, also one that is long void, and about any place."""
        if (found := self.submit_of(pick)) is None:
            return
        where, submit = found
        length = self.lengths[submit.request_id]
        tokens = list(range(index, min(index + count, length)))
        finish = FinishReason.LENGTH if index + count >= length else None
        item = Output(
            request_id=submit.request_id,
            attempt=submit.attempt,
            choice=choice % submit.params.n,
            index=index,
            token_ids=tokens,
            finish=finish,
        )
        outputs = Outputs(incarnation=where.incarnation, items=[item])
        if len(tokens) == 1 and finish is None:
            short = Token(item.request_id, item.attempt, item.choice, index, tokens[0])
            outputs = Outputs(incarnation=where.incarnation, tokens=[short])
        self.dispatcher.on_outputs(where, outputs, self.now)

    def reject(self, pick: int) -> None:
        if (found := self.submit_of(pick)) is not None:
            where, submit = found
            error = WireError(status=429, type="x", message="full")
            rejected = Rejected(
                request_id=submit.request_id,
                attempt=submit.attempt,
                incarnation=where.incarnation,
                error=error,
            )
            self.dispatcher.on_rejected(where, rejected, self.now)

    def give_back(self, pick: int) -> None:
        if (found := self.submit_of(pick)) is not None:
            where, submit = found
            returned = Returned(
                request_id=submit.request_id, attempt=submit.attempt, incarnation=where.incarnation
            )
            self.dispatcher.on_returned(where, returned, self.now)

    def cancel(self, pick: int) -> None:
        if self.sinks:
            self.dispatcher.cancel(RequestId(list(self.sinks)[pick % len(self.sinks)]), self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.dispatcher.tick(self.now)

    def check(self) -> None:
        self.dispatcher.check()
        for sink in self.sinks.values():
            assert len(sink.endings) <= 1
            for tokens in sink.tokens_of.values():
                assert tokens == list(range(len(tokens)))


WORKER = st.sampled_from(["w0", "w1"])
PICK = st.integers(0, 50)
EVENTS = st.one_of(
    st.tuples(st.just("open"), st.integers(1, 3), st.integers(1, 4), st.none() | st.integers(1, 3)),
    st.tuples(st.just("up"), WORKER),
    st.tuples(st.just("end"), WORKER),
    st.tuples(st.just("route"), st.lists(WORKER, unique=True, max_size=2)),
    st.tuples(st.just("start"), PICK),
    st.tuples(st.just("token"), PICK, st.integers(0, 2), st.integers(0, 4), st.integers(1, 3)),
    st.tuples(st.just("reject"), PICK),
    st.tuples(st.just("give_back"), PICK),
    st.tuples(st.just("cancel"), PICK),
    st.tuples(st.just("wait"), st.floats(0, 100)),
)


@settings(max_examples=300)
@given(st.lists(EVENTS, max_size=60))
def test_every_request_ends_exactly_once(events: list[tuple[Any, ...]]) -> None:
    chaos = Chaos()
    for worker in ("w0", "w1"):
        chaos.up(worker)
    chaos.route(["w0", "w1"])
    for name, *values in events:
        getattr(chaos, name)(*values)
        chaos.check()
    chaos.wait(10_000)
    chaos.check()
    assert len(chaos.dispatcher) == 0
    assert all(len(sink.endings) == 1 for sink in chaos.sinks.values())


@settings(max_examples=100)
@given(st.lists(EVENTS, max_size=60))
def test_fail_all_ends_everything(events: list[tuple[Any, ...]]) -> None:
    chaos = Chaos()
    chaos.up("w0")
    chaos.route(["w0"])
    for name, *values in events:
        getattr(chaos, name)(*values)
    chaos.dispatcher.fail_all(Unavailable("stop"), chaos.now)
    assert len(chaos.dispatcher) == 0
    assert all(len(sink.endings) == 1 for sink in chaos.sinks.values())


def ready() -> tuple[Dispatcher, FakeLinks]:
    links = FakeLinks()
    dispatcher = Dispatcher(links, max_held=1000)
    dispatcher.on_worker_up(W1, 0)
    dispatcher.on_routes(routes("w0"), 0)
    return dispatcher, links


def test_a_stop_string_in_a_token_cancels_the_choice() -> None:
    """The worker, which does not know, would go on."""
    dispatcher, links = ready()
    sink = CountingSink()
    sink.stop_at = 2
    dispatcher.open(make_request(0), sink, 0)
    for index in range(3):
        token = Token("r0", 1, 0, index, index)
        dispatcher.on_outputs(W1, Outputs(incarnation=1, tokens=[token]), 1)
    assert links.sent[1:] == [(W1, CancelChoice(request_id="r0", attempt=1, choice=0))]
    assert sink.tokens_of == {0: [0, 1]} and sink.endings == [Finished()] and not len(dispatcher)


def test_a_model_without_route_is_demanded_once() -> None:
    links = FakeLinks()
    dispatcher = Dispatcher(links, max_held=10)
    for number in range(3):
        dispatcher.open(make_request(number), CountingSink(), 0)
    assert links.demands == [MODEL]
    dispatcher.on_controller_up(1)
    assert links.demands == [MODEL, MODEL]
    dispatcher.on_worker_up(W1, 2)
    dispatcher.on_routes(routes("w0"), 2)
    assert [submit.request_id for submit in links.submits] == ["r0", "r1", "r2"]


def test_the_last_routes_serve_while_the_controller_is_away() -> None:
    dispatcher, links = ready()
    assert not dispatcher.routing.update(routes(version=1))
    dispatcher.open(make_request(), CountingSink(), 5)
    assert len(links.submits) == 1


def test_a_full_gateway_says_so() -> None:
    dispatcher = Dispatcher(FakeLinks(), max_held=2)
    for number in range(2):
        dispatcher.open(make_request(number), CountingSink(), 0)
    with pytest.raises(RequestError, match="wait already") as caught:
        dispatcher.open(make_request(2), CountingSink(), 0)
    assert caught.value.status == 429
    assert caught.value.retry_after is not None


def test_a_gap_is_run_again() -> None:
    dispatcher, links = ready()
    request, sink = make_request(), CountingSink()
    dispatcher.open(request, sink, 0)
    dispatcher.on_outputs(W1, Outputs(incarnation=1, items=[output(request, 0, [0])]), 0)
    dispatcher.on_outputs(W1, Outputs(incarnation=1, items=[output(request, 2, [2])]), 0)
    assert links.cancels == [CancelChoice(request_id="r0", attempt=1)]
    assert links.submits[-1].attempt == 2
    assert links.submits[-1].resumed[0].token_ids == [0]


def test_what_a_worker_returns_goes_on_where_the_model_is() -> None:
    """And nobody is suspected of anything."""
    dispatcher, links = ready()
    target = place("w1")
    dispatcher.on_worker_up(target, 0)
    request, sink = make_request(), CountingSink()
    dispatcher.open(request, sink, 0)
    dispatcher.on_outputs(W1, Outputs(incarnation=1, items=[output(request, 0, [0, 1])]), 0)
    moved = Route(model=MODEL, workers=["w1"], draining=["w0"])
    dispatcher.on_routes(Routes(epoch=1, version=2, routes=[moved]), 1)
    dispatcher.on_returned(target, Returned(request_id="r0", attempt=1, incarnation=1), 1)  # not its worker
    dispatcher.on_returned(W1, Returned(request_id="r0", attempt=0, incarnation=1), 1)  # an earlier attempt
    assert len(links.submits) == 1
    for _ in range(2):
        dispatcher.on_returned(W1, Returned(request_id="r0", attempt=1, incarnation=1), 1)
    assert [where for where, m in links.sent if isinstance(m, Submit)] == [W1, target]
    assert links.submits[-1].resumed[0].token_ids == [0, 1]
    assert (request.num_deaths, request.strikes) == (0, 0)
    dispatcher.check()


def test_resubmissions_go_by_slack_and_at_a_bounded_rate() -> None:
    dispatcher, links = ready()
    for number in range(200):
        dispatcher.open(make_request(number, arrival=200 - number / 100), CountingSink(), 200)
    dispatcher.on_worker_ended(W1, 200)
    dispatcher.on_worker_up(W2, 201)
    again = [message.request_id for where, message in links.sent if where == W2]
    assert again == [f"r{number}" for number in range(199, 199 - 64, -1)]
    times = [201.0]
    while dispatcher.num_held():
        next_time = dispatcher.tick(times[-1])
        if dispatcher.num_held():
            assert next_time is not None
            assert next_time > times[-1]
            times.append(next_time)
    assert 0.6 < times[-1] - times[0] < 0.8
    assert len(times) < 25
    assert len(links.submits) == 400


def test_a_late_request_is_overloaded_and_a_slow_one_unavailable() -> None:
    dispatcher, links = ready()
    sinks = [CountingSink(), CountingSink()]
    requests = [make_request(0), make_request(1)]
    for request, sink in zip(requests, sinks, strict=True):
        dispatcher.open(request, sink, 0)
    dispatcher.on_outputs(W1, Outputs(incarnation=1, items=[output(requests[1], 0, [0])]), 1)
    until = dispatcher.tick(1)
    assert until == 61
    dispatcher.tick(until)
    assert [ending.error.status for ending in sinks[0].endings if isinstance(ending, Failed)] == [429]
    assert not sinks[1].endings
    dispatcher.tick(600)
    assert [ending.error.status for ending in sinks[1].endings if isinstance(ending, Failed)] == [503]
    assert [cancel.request_id for cancel in links.cancels] == ["r0", "r1"]
    assert dispatcher.tick(601) is None


def kill(dispatcher: Dispatcher, request: Request, incarnation: int, now: float) -> None:
    """A worker dies of a request that it has started."""
    where = place(incarnation=incarnation)
    started = Started(
        request_id=request.request_id,
        attempt=request.attempt,
        incarnation=incarnation,
        queue_seconds=0,
        cached_tokens=0,
    )
    dispatcher.on_started(where, started, now)
    dispatcher.on_worker_ended(where, now)
    dispatcher.on_worker_up(place(incarnation=incarnation + 1), now)


def test_a_model_that_kills_workers_is_quarantined() -> None:
    dispatcher, _ = ready()
    incarnations = itertools.count(1)
    for number in range(3):
        request, sink = make_request(number), CountingSink()
        dispatcher.open(request, sink, 100)
        while request.ending is None:
            kill(dispatcher, request, next(incarnations), 100)
        assert request.num_deaths == 3
    with pytest.raises(RequestError, match="quarantined") as caught:
        dispatcher.open(make_request(9), CountingSink(), 120)
    assert caught.value.status == 503
    assert MODEL in caught.value.message
    assert caught.value.retry_after == pytest.approx(40)
    dispatcher.open(make_request(10), CountingSink(), 161)


def test_demand_goes_out_again_when_the_routed_worker_has_died() -> None:
    dispatcher, links = ready()
    dispatcher.open(make_request(0), CountingSink(), 0)
    dispatcher.on_worker_ended(W1, 1)
    assert links.demands == [MODEL]
    dispatcher.on_worker_up(W2, 2)
    dispatcher.on_worker_ended(W2, 3)
    assert links.demands == [MODEL, MODEL]
