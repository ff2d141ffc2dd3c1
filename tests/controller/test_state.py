from __future__ import annotations

from prism.controller.migration import Migration, Phase
from prism.controller.snapshot import Home
from prism.controller.state import ControllerState
from prism.messages import Route
from prism.types import ModelId, ModelState, WorkerId
from tests.controller.reports import model_report, report

A, B = ModelId("a"), ModelId("b")
HOME, OTHER = WorkerId("worker-0"), WorkerId("worker-1")


def new_state() -> ControllerState:
    return ControllerState(epoch=3, homes={A: (Home(HOME),), B: (Home(OTHER),)})


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


# --- several homes, and what is so though nobody decided it -----------------------------------------------


def active(known: ControllerState, worker: WorkerId, model: str = "a", **fields: object) -> bool:
    known.on_report(report(worker, model_report(model, **{"state": ModelState.ACTIVE} | fields)))
    return known.adopt(worker, now=100.0)


def test_what_came_before_anybody_asked_is_no_home_and_not_in_memory() -> None:
    """Its home may change without a migration, and where it came by itself it does not live."""
    state = new_state()
    assert not active(state, OTHER, is_ahead=True)
    assert state.workers(A) == (HOME,) and not state.resident(A)
    assert state.living_at(HOME) == [A] and state.living_at(OTHER) == [B]


def test_routes_have_weights_if_devices_differ_and_name_who_drains() -> None:
    state = new_state()
    state.speeds = {HOME: 1.0, OTHER: 2.0}
    state.homes[A] = (Home(HOME), Home(OTHER))
    state.migrations[B] = Migration(B, HOME, OTHER, Phase.DRAINING, 0.0)
    assert state.routes() == [
        Route(model="a", workers=["worker-0", "worker-1"], weights=[1.0, 2.0]),
        Route(model="b", workers=["worker-1"], draining=["worker-0"]),
    ]
    state.migrations[B] = Migration(B, HOME, OTHER, Phase.LOADING, 0.0)
    assert state.routes()[1].draining == []


def test_where_a_model_is_active_it_lives() -> None:
    """A controller that was restarted knows nothing of what its predecessor has moved."""
    state = new_state()
    assert active(state, OTHER)
    assert state.workers(A) == (OTHER,)
    assert not active(state, OTHER)


def test_a_model_that_is_active_at_home_too_lives_on_both_until_placement_merges_it() -> None:
    state = new_state()
    assert not active(state, HOME)
    assert active(state, OTHER)
    assert state.workers(A) == (HOME, OTHER)
    assert not active(state, OTHER, state=ModelState.EVICTING)
    assert active(state, OTHER, state=ModelState.COLD)
    assert state.workers(A) == (HOME,)
    assert not active(state, HOME, state=ModelState.COLD), "it has no other home"


def test_a_fresh_home_may_be_cold_for_a_while() -> None:
    state = new_state()
    state.homes[A] = (Home(HOME), Home(OTHER, since=90.0))
    assert not active(state, OTHER, state=ModelState.COLD)


def test_what_is_being_moved_is_left_to_its_migration() -> None:
    state = new_state()
    state.migrations[A] = Migration(A, HOME, OTHER, Phase.LOADING, 0.0)
    assert not active(state, OTHER)
    assert state.places(A) == (HOME, OTHER)


def test_homes_change_and_wait_before_they_change_again() -> None:
    state = new_state()
    state.switch(A, HOME, OTHER, now=100.0, cooldown=60.0)
    assert state.homes[A] == (Home(OTHER, 100.0, 0),)
    state.switch(A, None, HOME, now=200.0, cooldown=60.0)
    assert state.homes[A] == (Home(OTHER, 200.0), Home(HOME, 200.0))
    state.switch(A, OTHER, None, now=300.0, cooldown=60.0)
    assert state.homes[A] == (Home(HOME, 300.0),)
    state.switch(A, HOME, None, now=300.0, cooldown=60.0)
    assert state.homes[A] == (Home(HOME, 300.0),), "one home stays"
    state.stay(A, now=310.0, cooldown=60.0)
    assert state.homes[A] == (Home(HOME, 310.0, 1, has_failed=True),)
    state.switch(A, None, OTHER, now=400.0, cooldown=60.0)
    assert state.homes[A] == (Home(HOME, 400.0, 1), Home(OTHER, 400.0))
