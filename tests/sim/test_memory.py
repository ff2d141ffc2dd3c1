"""Free slabs are taken at once where nobody else is to be asked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.engine.scheduler import Want
from prism.modes import Mode
from prism.sim.device import SimDevice
from prism.sim.jobs import Job, policy_rank
from prism.sim.memory import Memory
from prism.sim.model import SimModel
from prism.sim.ticks import PER_SECOND
from prism.types import ModelId, ModelState, RequestId
from tests.sim import random_loads

SHAPES = [(1, 16384, 1e-3, 0.0, 5e-3)] * 2


def request(index: int) -> Job:
    return Job(RequestId(f"{index:03d}"), ModelId("m1"), index, 10, 10, due=0)


def memory_with_model(free: int, used_blocks: int, limit: int | None) -> tuple[Memory, SimModel]:
    """A model in memory with one slab of KV, on a device that has so many free ones beside it."""
    device = random_loads.run(Mode.PRISM, SHAPES, [], 1, free - 1)
    model = device.models[ModelId("m1")]
    device.memory.activate(model)
    model.state, model.prompt_blocks, model.kv_limit = ModelState.ACTIVE, used_blocks, limit
    return device.memory, model


@given(
    st.integers(1, 5),
    st.integers(0, 8),
    st.none() | st.integers(1, 5),
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
)
def test_what_is_taken_at_once_is_what_would_be_taken_one_by_one(
    free: int, used: int, limit: int | None, wants: list[int]
) -> None:
    at_once, model = memory_with_model(free, used, limit)
    one_by_one, other = memory_with_model(free, used, limit)
    if sum(wants) <= model.free_blocks:
        return
    before = at_once.free, model.kv_slabs
    if at_once.take_free(model, sum(wants), 0):
        ranked = [Want(policy_rank(request(index)), num) for index, num in enumerate(wants)]
        one_by_one.ensure_kv(other, ranked, 0)
        assert model.free_blocks >= sum(wants)
        assert (at_once.free, model.kv_slabs) == (one_by_one.free, other.kv_slabs)
    else:
        assert (at_once.free, model.kv_slabs) == before


def test_what_an_older_request_waits_for_is_not_taken() -> None:
    """Of a model whose weights have no room yet, and which may stop others by now."""
    device = random_loads.run(Mode.PRISM, SHAPES, [], 1, 1)
    old, young = device.models[ModelId("m0")], device.models[ModelId("m1")]
    device.memory.activate(young)
    young.state = ModelState.ACTIVE
    old.state = ModelState.FETCHING
    old.take(Job(RequestId("000"), ModelId("m0"), 0, 10, 10, due=0))
    young.take(request(1))
    wanted = young.free_blocks + 1
    now = PER_SECOND
    assert now >= device.memory.displaces_at(old) > 0
    assert not device.memory.take_free(young, wanted, now)
    assert device.memory.take_free(young, wanted, 0)


def test_nothing_is_promised_that_is_others_or_that_somebody_waits_for() -> None:
    memory, model = memory_with_model(5, 0, None)
    assert memory.spare(model) == 5
    memory.promised = 2
    assert memory.spare(model) == 3
    assert not memory.take_free(model, model.free_blocks + 4 * model.blocks_per_slab, 0, left=memory.promised)
    model.kv_limit = model.kv_slabs + 1
    assert memory.spare(model) == 1
    waiting = memory._models[ModelId("m0")]
    waiting.state = ModelState.FETCHING
    assert memory.spare(model) == 1, "nobody waits for it"
    waiting.take(Job(RequestId("000"), ModelId("m0"), 0, 10, 10, due=0))
    assert memory.spare(model) == 0


def test_who_was_promised_slabs_hears_that_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By others, or of what a model had when its run was planned; and that somebody waits for weights."""
    device = random_loads.run(Mode.PRISM, SHAPES, [], 1, 4)
    memory, model = device.memory, device.models[ModelId("m1")]
    memory.activate(model)
    model.state = ModelState.ACTIVE
    heard: list[SimModel | None] = []
    monkeypatch.setattr(SimDevice, "stop_growing", lambda _, model=None: heard.append(model))
    memory.promised = memory.free - 1
    assert memory.take_free(model, model.free_blocks + 1, 0) and not heard
    assert memory.take_free(model, model.free_blocks + 1, 0) and heard == [None]
    memory.promised = 0
    memory.trim(model)
    assert heard == [None, model] and memory.free
    other = device.models[ModelId("m0")]
    other.weight_slabs = memory.num_slabs
    other.take(Job(RequestId("000"), ModelId("m0"), 0, 10, 10, due=0))
    assert not device.loader.want(other, 0) and heard == [None, model, None]
