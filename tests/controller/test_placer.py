"""When placement looks, and what a demand may change at once."""

from __future__ import annotations

from typing import Any

import pytest

from prism.config import SchedulingConfig
from prism.controller.moves import Moves
from prism.controller.placer import SOON, Placer
from prism.controller.snapshot import DeviceState, Home, ModelNeed
from prism.controller.state import ControllerState
from prism.controller.views import Catalog
from prism.types import MiB, ModelId, ModelState, WorkerId
from tests.controller.reports import model_report, report

A, PIN = ModelId("a"), ModelId("pin")
W0, W1 = WorkerId("worker-0"), WorkerId("worker-1")


class NoHands:
    """Nothing is moved here."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a migration: {name}")


class World:
    """Two devices of eight slabs; `a` lives on the first, `pin` on the second, which is up."""

    def __init__(self, **scheduling: Any) -> None:
        self.state = ControllerState(epoch=1, homes={A: (Home(W0),), PIN: (Home(W1),)})
        devices = tuple(DeviceState(worker, 16 * MiB, 2 * MiB) for worker in (W0, W1))
        catalog = Catalog((ModelNeed(A, 4 * MiB), ModelNeed(PIN, 12 * MiB)), devices)
        moves = Moves(self.state, NoHands(), cooldown=120.0, drain_seconds=60.0)
        config = SchedulingConfig(**scheduling)
        self.placer = Placer(config, catalog, self.state, moves, lambda: frozenset((W1,)), 100.0)

    def tell(self, state: ModelState) -> None:
        models = model_report("a"), model_report("pin", weights_bytes=12 * MiB, pinned=True, state=state)
        told = report("worker-1", *models)
        assert self.state.on_report(told)
        self.placer.on_report(told, 100.0)


@pytest.mark.parametrize(
    ("state", "counts"), [(ModelState.ACTIVE, True), (ModelState.COLD, True), (ModelState.FAILED, False)]
)
def test_pins_count_where_their_models_live_and_can_come(state: ModelState, counts: bool) -> None:
    """Each worker says that a configured model is pinned; where it does not live nothing is kept for it."""
    world = World()
    world.tell(state)
    assert [need.is_pinned for need in world.placer.snapshot(100.0).models] == [False, counts]
    world.state.set_homes(PIN, (Home(W0),))
    assert not any(need.is_pinned for need in world.placer.snapshot(100.0).models)


def test_a_demand_gives_a_home_that_is_up_whatever_is_pinned_there() -> None:
    """Its worker says why it is refused; to wait for its own, which may never come, told nobody anything."""
    world = World()
    world.tell(ModelState.ACTIVE)
    assert world.placer.on_demand(A, 100.0)
    assert world.state.workers(A) == (W1,)


def test_it_looks_soon_if_it_ever_looks() -> None:
    placer = World(placement_interval=10.0).placer
    placer.look_soon(101.0)
    placer.tick(101.0 + SOON / 2)
    assert placer.plan is None
    placer.tick(101.0 + SOON)
    assert placer.plan is not None and placer.due == 101.0 + SOON + 10.0
    placer.look_soon(110.5 + SOON)  # it does so earlier by itself
    assert placer.due == 111.0 + SOON
    never = World(placement_interval=0.0).placer
    never.look_soon(101.0)
    never.tick(10_000.0)
    assert never.plan is None
