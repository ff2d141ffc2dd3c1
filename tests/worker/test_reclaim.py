from __future__ import annotations

from typing import Any

from prism.types import ModelId
from prism.worker.reclaim import (
    AwaitRetirement,
    CancelLoad,
    DropCache,
    DropOwnCache,
    EvictModel,
    PreemptYoungest,
    TakeEmpty,
    decide,
)
from prism.worker.snapshot import Holding, MemorySnapshot, Need

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
NOW = 100.0


def holding(model: ModelId, **values: Any) -> Holding:
    """A busy model with old requests that can give nothing up."""
    defaults = {
        "model": model,
        "is_active": True,
        "is_pinned": False,
        "kv_slabs": 3,
        "kv_floor": 0,
        "kv_limit": None,
        "empty_slabs": 0,
        "gatherable_slabs": 0,
        "num_cached_blocks": 0,
        "recompute_cost": 1.0,
        "last_used": NOW,
        "active_since": 0.0,
        "is_idle": False,
        "oldest_request": 1.0,
        "youngest_running": 1.0,
    }
    return Holding(**(defaults | values))


def ask(
    *holdings: Holding, need: Need | None = None, retiring: int = 0, unwanted: tuple[ModelId, ...] = ()
) -> Any:
    need = need or Need(A, 1, 50.0, for_weights=False)
    return decide(MemorySnapshot(retiring, holdings, unwanted, 2.0), need, NOW)


def test_order_of_reclaim() -> None:
    """Each source is used only when those before it are exhausted."""
    empty = holding(B, empty_slabs=1, gatherable_slabs=1)
    cached = holding(B, gatherable_slabs=1)
    idle = holding(C, is_idle=True, oldest_request=None, youngest_running=None)
    younger = holding(B, oldest_request=60.0, youngest_running=60.0)
    busy = holding(B, oldest_request=60.0, youngest_running=None)
    assert ask(empty, idle, retiring=1) == AwaitRetirement()
    assert ask(empty, idle, retiring=1, unwanted=(C,)) == AwaitRetirement()
    assert ask(empty, idle, unwanted=(C,)) == CancelLoad(C)
    assert ask(empty, idle) == TakeEmpty(B, 1)
    assert ask(cached, idle) == DropCache(B, 1)
    assert ask(younger, idle) == EvictModel(C)
    assert ask(younger) == PreemptYoungest(B)
    assert ask(busy) == EvictModel(B)
    assert ask(holding(B)) is None


def test_older_requests_keep_what_they_have() -> None:
    assert ask(holding(B, youngest_running=49.0, oldest_request=49.0)) is None


def test_floors_and_pins_hold() -> None:
    assert ask(holding(B, kv_floor=3, empty_slabs=1, gatherable_slabs=2)) is None
    idle = holding(B, is_idle=True, is_pinned=True, oldest_request=None, youngest_running=None)
    assert ask(idle) is None


def test_at_its_limit_a_model_recycles_its_own_cache() -> None:
    rich = holding(B, empty_slabs=2)
    assert ask(holding(A, kv_limit=3, num_cached_blocks=5), rich) == DropOwnCache(A)
    assert ask(holding(A, kv_limit=3), rich) is None


def test_cheapest_cache_goes_first() -> None:
    cheap = holding(B, gatherable_slabs=1, recompute_cost=1.0)
    dear = holding(C, gatherable_slabs=1, recompute_cost=9.0)
    assert ask(dear, cheap) == DropCache(B, 1)
    stale = holding(C, gatherable_slabs=1, recompute_cost=9.0, last_used=NOW - 60)
    assert ask(stale, cheap) == DropCache(C, 1)


def test_a_model_that_has_just_come_stays() -> None:
    assert ask(holding(B, oldest_request=60.0, youngest_running=None, active_since=99.0)) is None


def test_least_recently_used_idle_model_goes() -> None:
    idle = {"is_idle": True, "oldest_request": None, "youngest_running": None}
    assert ask(holding(B, last_used=90.0, **idle), holding(C, last_used=80.0, **idle)) == EvictModel(C)
