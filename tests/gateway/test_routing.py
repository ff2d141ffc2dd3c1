"""Which of several workers gets a request."""

from __future__ import annotations

import msgspec
import pytest

from prism.gateway.routing import Routing, choose
from prism.messages import Route, Routes
from prism.types import ModelId, ModelState
from tests.controller.reports import model_report, report
from tests.gateway.fakes import MODEL, place

W0, W1 = place("w0"), place("w1")


@pytest.fixture
def routing() -> Routing:
    routing = Routing()
    routing.worker_up(W0)
    routing.worker_up(W1)
    return routing


def route(routing: Routing, **fields: object) -> None:
    workers = {"workers": ["w0", "w1"]} | fields
    assert routing.update(Routes(epoch=1, version=1, routes=[Route(model=MODEL, **workers)]))  # type: ignore[arg-type]


def tell(routing: Routing, worker: str, num_running: int, state: ModelState = ModelState.ACTIVE) -> None:
    routing.report(report(worker, model_report(MODEL, state=state, num_running=num_running)))


def chosen(routing: Routing, prompts: int = 20) -> set[str]:
    found = [choose(routing.candidates(ModelId(MODEL)), [number]) for number in range(prompts)]
    return {placement.worker for placement in found if placement is not None}


def test_who_has_the_model_comes_first_then_the_least_loaded_then_the_prompt(routing: Routing) -> None:
    route(routing)
    tell(routing, "w0", 0, ModelState.COLD)
    tell(routing, "w1", 100)
    assert chosen(routing) == {"w1"}
    tell(routing, "w0", 50)
    assert chosen(routing) == {"w0"}
    tell(routing, "w1", 50)
    assert chosen(routing) == {"w0", "w1"}


def test_a_draining_worker_gets_nothing_unless_no_other_is_up(routing: Routing) -> None:
    route(routing, workers=["w1"], draining=["w0"])
    tell(routing, "w0", 0)
    tell(routing, "w1", 100, ModelState.LOADING)
    assert chosen(routing) == {"w1"}
    routing.worker_ended(W1)
    assert chosen(routing) == {"w0"}


def test_a_silent_worker_gets_nothing_unless_no_other_is_up(routing: Routing) -> None:
    """One that drains is better, and one that must load the model."""
    route(routing, workers=["w0"], draining=["w1"])
    tell(routing, "w0", 0)
    tell(routing, "w1", 100, ModelState.COLD)
    routes = Routes(epoch=1, version=2, routes=[Route(model=MODEL, workers=["w0"], draining=["w1"])])
    assert routing.update(msgspec.structs.replace(routes, silent=["w0"]))
    assert chosen(routing) == {"w1"}
    routing.worker_ended(W1)
    assert chosen(routing) == {"w0"}


def test_a_worker_of_more_weight_bears_more(routing: Routing) -> None:
    route(routing, weights=[1.0, 4.0])
    tell(routing, "w0", 10)
    tell(routing, "w1", 30)
    assert chosen(routing) == {"w1"}
