from __future__ import annotations

from typing import Any

from prism.types import ModelId, ModelState, RequestId
from prism.worker.admission import Admit, Expire, decide
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
        "num_obtainable_blocks": 100,
    }
    return ModelLoad(**(defaults | values))


def snapshot(*requests: WaitingRequest, running: int = 0, alone: bool = False, **a: Any) -> AdmissionSnapshot:
    return AdmissionSnapshot(requests, {A: load(A, **a), B: load(B)}, running, alone)


def test_earliest_deadline_enters_first() -> None:
    later, sooner = waiting("later", deadline=3.0), waiting("sooner", deadline=2.0)
    assert decide(snapshot(later, sooner), 0.0) == (Admit(sooner.request_id), Admit(later.request_id))


def test_expired_requests_are_refused() -> None:
    assert decide(snapshot(waiting("r", expires=5.0)), 5.0) == (Expire(RequestId("r")),)


def test_requests_wait_for_their_model() -> None:
    assert decide(snapshot(waiting("r"), state=ModelState.LOADING), 0.0) == ()


def test_a_large_request_is_not_overtaken_in_its_model_only() -> None:
    large = waiting("large", deadline=1.0, num_blocks=50)
    small = waiting("small", deadline=2.0)
    other = waiting("other", deadline=3.0, model=B)
    taken = decide(snapshot(large, small, other, num_sequences=1, num_obtainable_blocks=10), 0.0)
    assert taken == (Admit(RequestId("other")),)


def test_an_idle_model_always_takes_one() -> None:
    large = waiting("large", num_blocks=5000)
    assert decide(snapshot(large, num_obtainable_blocks=0), 0.0) == (Admit(large.request_id),)


def test_a_suspect_runs_alone() -> None:
    suspect, other = waiting("suspect", alone=True), waiting("other", model=B)
    assert decide(snapshot(suspect, other, running=1), 0.0) == ()
    assert decide(snapshot(suspect, other), 0.0) == (Admit(suspect.request_id),)
    assert decide(snapshot(other, running=1, alone=True), 0.0) == ()


def test_batch_size_bounds_what_enters() -> None:
    requests = [waiting(str(i)) for i in range(5)]
    assert len(decide(snapshot(*requests, num_sequences=6), 0.0)) == 2


def test_a_model_on_its_way_in_takes_requests_once_its_first_step_can_follow() -> None:
    request = waiting("r")
    assert decide(snapshot(request, state=ModelState.LOADING), 0.0) == ()
    arriving = snapshot(request, state=ModelState.LOADING, is_arriving=True)
    assert decide(arriving, 0.0) == (Admit(RequestId("r")),)


def test_a_suspect_waits_for_a_whole_model() -> None:
    """Alone means that nothing else is on the device, a copy of weights least of all."""
    arriving = snapshot(waiting("r", alone=True), state=ModelState.LOADING, is_arriving=True)
    assert decide(arriving, 0.0) == ()
