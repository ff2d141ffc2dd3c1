from __future__ import annotations

from prism.controller.state import ControllerState
from prism.messages import Route
from prism.types import ModelId, WorkerId
from tests.controller.reports import model_report, report

A, B = ModelId("a"), ModelId("b")
HOME, OTHER = WorkerId("worker-0"), WorkerId("worker-1")


def new_state() -> ControllerState:
    return ControllerState(epoch=3, homes={A: HOME, B: OTHER})


def test_each_model_is_routed_to_its_home_whether_or_not_that_is_up() -> None:
    routes = [Route(model="a", workers=["worker-0"]), Route(model="b", workers=["worker-1"])]
    assert new_state().routes() == routes


def test_a_model_is_what_its_home_says_of_it() -> None:
    state = new_state()
    assert state.model_report(A) is None
    state.on_report(report("worker-0", model_report("a", num_running=1), model_report("b", num_running=2)))
    state.on_report(report("worker-1", model_report("b", num_running=3)))
    mine, others = state.model_report(A), state.model_report(B)
    assert mine is not None and mine.num_running == 1
    assert others is not None and others.num_running == 3


def test_a_worker_that_does_not_know_the_model_says_nothing_of_it() -> None:
    state = new_state()
    state.on_report(report("worker-0"))
    assert state.model_report(A) is None


def test_an_earlier_incarnation_is_void() -> None:
    state = new_state()
    state.on_report(report("worker-0", incarnation=2, num_free_slabs=5))
    state.on_report(report("worker-0", incarnation=1, num_free_slabs=1))
    assert state.reports[HOME].num_free_slabs == 5
    state.on_report(report("worker-0", incarnation=2, num_free_slabs=4))
    assert state.reports[HOME].num_free_slabs == 4


def test_nothing_is_known_of_a_worker_that_has_ended() -> None:
    state = new_state()
    state.on_report(report("worker-0", model_report("a")))
    state.on_worker_ended(HOME)
    state.on_worker_ended(OTHER)  # of which nothing was known
    assert state.reports == {} and state.model_report(A) is None
