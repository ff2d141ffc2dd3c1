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
from prism.types import MiB, ModelId, WorkerId
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

    def tell(self, *, pinned: bool) -> None:
        models = model_report("a"), model_report("pin", weights_bytes=12 * MiB, pinned=pinned)
        told = report("worker-1", *models)
        assert self.state.on_report(told)
        self.placer.on_report(told, 100.0)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_demand_gives_no_home_beside_pinned_models_that_leave_no_room(pinned: bool) -> None:
    """Its own device was starting still: it came to live where it was refused, and stayed there."""
    world = World()
    world.tell(pinned=pinned)
    assert world.placer.on_demand(A, 100.0) is not pinned
    assert world.state.workers(A) == ((W0,) if pinned else (W1,))


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
