"""Where models live: room, pressure, replicas, unequal devices, and that a steady load keeps them still."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism.controller.decisions import Decision, Merge, Move, Plan, Rehome, Replicate
from prism.controller.placement import decide, first_homes
from prism.controller.pressure import Fleet, entry_of
from prism.controller.snapshot import DeviceState, Home, ModelNeed, PlacementSnapshot, Policy
from prism.messages import WAITS
from prism.types import ModelId, WorkerId

NOW = 1000.0
USUAL = Policy()
W0, W1, W2 = (WorkerId(f"worker-{i}") for i in range(3))


def device(index: int, memory: int = 100, **fields: object) -> DeviceState:
    return DeviceState(WorkerId(f"worker-{index}"), memory, **fields)  # type: ignore[arg-type]


def model(name: str, weights: int = 10, *homes: WorkerId, **fields: object) -> ModelNeed:
    return ModelNeed(ModelId(name), weights, resident=frozenset(homes), **fields)  # type: ignore[arg-type]


def at(*workers: WorkerId, since: float = float("-inf")) -> tuple[Home, ...]:
    return tuple(Home(worker, since) for worker in workers)


def run(
    models: list[ModelNeed],
    devices: list[DeviceState],
    homes: dict[str, tuple[Home, ...]] | None = None,
    policy: Policy = USUAL,
    busy: tuple[str, ...] = (),
) -> Plan:
    named = {ModelId(name): each for name, each in (homes or {}).items()}
    fixed = frozenset(ModelId(name) for name in busy)
    return decide(PlacementSnapshot(tuple(models), tuple(devices), named, fixed, policy), NOW)


def workers_of(plan: Plan, name: str) -> list[str]:
    return sorted(home.worker for home in plan.homes[ModelId(name)])


def first(*sizes: int, devices: tuple[DeviceState, ...]) -> list[str]:
    models = tuple(ModelNeed(ModelId(f"m{i}"), size) for i, size in enumerate(sizes))
    homes = first_homes(models, devices)
    return [homes[each.model][0].worker.removeprefix("worker-") for each in models]


# --- before anybody has asked ---------------------------------------------------------------------------

SMALL, LARGE = DeviceState(W0, 11), DeviceState(W1, 30)


def test_the_largest_model_gets_the_largest_device() -> None:
    assert first(4, 20, devices=(SMALL, LARGE)) == ["0", "1"]


def test_more_than_fits_is_spread_by_share_of_memory() -> None:
    assert first(10, 10, 10, 10, devices=(SMALL, LARGE)) == ["1", "1", "0", "1"]


def test_a_model_goes_where_the_configuration_wants_it() -> None:
    models = (ModelNeed(ModelId("free"), 10), ModelNeed(ModelId("fixed"), 5, device=W1))
    homes = first_homes(models, (SMALL, DeviceState(W1, 11)))
    assert homes == {ModelId("free"): at(W0), ModelId("fixed"): at(W1)}


def test_first_homes_go_by_expected_load_and_give_each_model_one() -> None:
    loads = {"a": 0.95, "b": 0.5, "c": 0.4}
    models = tuple(ModelNeed(ModelId(name), 10, compute=load) for name, load in loads.items())
    homes = first_homes(models, (device(0), device(1)))
    assert homes == {"a": at(W0), "b": at(W1), "c": at(W1)}


def test_one_device_is_everybodys_home() -> None:
    assert first(5, 50, 0, devices=(SMALL,)) == ["0", "0", "0"]


def test_a_device_that_cannot_hold_a_model_is_not_its_home() -> None:
    """Weights of 2.1 slabs went to a device of two, where they could never be loaded."""
    two, four = DeviceState(W0, 20, 10), DeviceState(W1, 40, 10)
    assert first(21, 21, 5, devices=(two, four)) == ["1", "1", "0"]
    assert first(90, devices=(two, four)) == ["1"]


# --- by load --------------------------------------------------------------------------------------------


def test_the_two_that_compute_most_are_kept_apart() -> None:
    """The published placement weighs KV alone: it put them together, and a fixed one was 25 % better."""
    busy = {"compute": 0.6, "token_rate": 1.0}
    models = [model("a", 10, W0, **busy), model("b", 10, W0, **busy), model("c", 10, W1, token_rate=90.0)]
    plan = run(models, [device(0), device(1)], {"a": at(W0), "b": at(W0), "c": at(W1)})
    (move,) = plan.decisions
    assert isinstance(move, Move) and move.target == W1 and 0.4 < move.gain < 0.7
    assert workers_of(plan, "a") != workers_of(plan, "b")


def test_kv_counts_by_tokens_their_size_and_the_objective() -> None:
    hungry = {"token_rate": 1.0, "kv_bytes_per_token": 4, "tpot": 0.1}
    models = [model("a", 10, W0, **hungry), model("b", 10, W0, **hungry)]
    together = {"a": at(W0), "b": at(W0)}
    assert [type(d) for d in run(models, [device(0), device(1)], together).decisions] == [Move]
    patient = [replace(each, tpot=1.0) for each in models]
    assert run(patient, [device(0), device(1)], together).decisions == ()


def blocking(share: float, step: float) -> dict[str, Any]:
    """So much of the time it is in a step of this length."""
    return {"compute": share, "blocked": tuple(share * max(0.0, 1 - wait / step) for wait in WAITS)}


def test_a_model_leaves_a_neighbour_whose_steps_outlast_its_objective() -> None:
    """A 1B with 13 ms to its first token stood beside a 14B whose single steps take longer, and the other
    device was a little busier."""
    quick = model("quick", 10, W0, ttft=0.013, request_rate=5.0, compute=0.02)
    long = model("long", 10, W0, ttft=2.0, request_rate=1.0, **blocking(0.5, 0.05))
    short = model("short", 10, W1, ttft=0.013, request_rate=5.0, **blocking(0.6, 0.004))
    homes = {"quick": at(W0), "long": at(W0), "short": at(W1)}
    devices = [device(0), device(1)]
    (move,) = run([quick, long, short], devices, homes).decisions
    assert isinstance(move, Move) and move.model == "quick" and move.target == W1
    patient = replace(quick, ttft=0.2)
    assert not run([patient, long, short], devices, homes).decisions, "it can wait"
    rare = replace(quick, request_rate=0.1)
    assert not run([rare, long, short], devices, homes).decisions, "hardly anybody is late"
    unsure = [replace(each, noise=0.6) for each in (quick, long, short)]
    assert not run(unsure, devices, homes).decisions, "chance may explain it"


def test_who_has_room_nowhere_else_stays_with_such_a_neighbour() -> None:
    quick = model("quick", 10, W0, ttft=0.013, request_rate=5.0, compute=0.02)
    long = model("long", 10, W0, ttft=2.0, request_rate=1.0, **blocking(1.0, 0.5))
    plan = run([quick, long], [device(0), device(1, 8)], {"long": at(W0)})
    assert workers_of(plan, "quick") == [W0]
    assert not plan.infeasible and not plan.crowded
    assert plan.pressures[W0] > 2.0


def test_who_can_wait_longer_than_a_step_is_not_late_for_it() -> None:
    """Objectives beyond half a second, the default one too, counted as half a second."""
    patient = model("patient", 10, W0, ttft=2.0, request_rate=5.0, compute=0.02)
    slow = model("slow", 10, W0, ttft=2.0, request_rate=1.0, **blocking(0.5, 1.0))
    both = {"patient": at(W0), "slow": at(W0)}
    assert run([patient, slow], [device(0)], both).pressures[W0] == pytest.approx(0.52)


def test_steps_of_its_own_make_no_request_late() -> None:
    alone = model("m", 10, W0, ttft=0.013, request_rate=5.0, **blocking(0.5, 0.05))
    assert run([alone], [device(0)], {"m": at(W0)}).pressures[W0] == pytest.approx(0.5)


def test_a_bilinear_sum_is_kept_while_models_come_and_go() -> None:
    rng = random.Random(1)
    made = [
        model(str(i), 1, ttft=rng.choice(WAITS), request_rate=rng.random(), **blocking(rng.random(), 0.1))
        for i in range(6)
    ]
    entries = [entry_of(each, 1) for each in made]
    fleet = Fleet([device(0)], 6.0)
    for entry in entries:
        fleet.add(entry, 0)
    without = fleet.with_removed(entries[2], 0)
    fleet.remove(entries[2], 0)
    assert fleet.pressures()[0] == pytest.approx(without)
    pairs = [(a, b) for a in made for b in made if a is not b and made[2] not in (a, b)]
    late = sum(a.request_rate * b.blocked[WAITS.index(a.ttft)] for a, b in pairs) / 6.0
    compute = sum(each.compute for each in made) - made[2].compute
    assert without == pytest.approx(compute + late)
    assert fleet.with_added(entries[2])[0] > without


def test_pressure_counts_after_adding() -> None:
    """Scored before, the small device would look as good as the large one."""
    hungry = model("a", 10, token_rate=10.0, kv_bytes_per_token=1, tpot=0.1)
    assert workers_of(run([hungry], [device(0, 20), device(1, 40)]), "a") == [W1]


def test_a_fast_device_bears_more() -> None:
    models = [model(name, 1, compute=0.3, token_rate=1.0) for name in "abcd"]
    plan = run(models, [device(0, speed=1.0), device(1, speed=3.0)])
    assert Counter(home.worker for homes in plan.homes.values() for home in homes) == {W1: 3, W0: 1}


def test_a_gain_that_is_small_too_late_or_too_dear_moves_nothing() -> None:
    load = {"compute": 0.5, "token_rate": 1.0}
    apart, together = [device(0), device(1)], {"a": at(W0), "b": at(W0)}
    models = [model("a", 10, W0, **load), model("b", 10, W0, **load)]
    assert len(run(models, apart, together).decisions) == 1
    assert run(models, apart, together, Policy(gain=0.6)).decisions == ()
    assert run(models, apart, together, Policy(max_moves=0)).decisions == ()
    dear = [replace(each, move_seconds=31.0) for each in models]
    assert run(dear, apart, together).decisions == ()
    assert len(run(dear, apart, together, Policy(horizon=70.0)).decisions) == 1
    fresh = {name: at(W0, since=NOW - 100) for name in "ab"}
    assert run(models, apart, fresh).decisions == ()
    assert run(models, apart, together, busy=("a", "b")).decisions == ()
    fixed = [replace(each, device=W0) for each in models]
    assert run(fixed, apart, together).decisions == ()


def test_what_chance_may_explain_moves_nothing_unless_the_device_is_full() -> None:
    """Two models that filled a device with few, long requests were never sure enough to come apart."""
    devices, homes = [device(0), device(1)], {"a": at(W0), "b": at(W0)}
    for compute, noise, count in ((0.4, 0.05, 1), (0.4, 0.5, 0), (0.5, 0.5, 1)):
        load = {"compute": compute, "token_rate": 1.0, "noise": noise}
        models = [model(name, 10, W0, **load) for name in "ab"]
        assert len(run(models, devices, homes).decisions) == count, (compute, noise)


def test_chance_must_not_turn_a_move_round_but_need_not_be_beaten_by_its_gain() -> None:
    """Seven models stayed on a device at 0.87 beside one at 0.1: each move would have gained too little."""
    few = {"token_rate": 1.0, "compute": 0.12, "noise": 0.18}
    models = [model(f"m{i}", 10, W0, **few) for i in range(7)]
    homes = {each.model: at(W0) for each in models}
    assert len(run(models, [device(0), device(1)], homes).decisions) == 2
    fewer = [replace(each, noise=0.5) for each in models[:3]]
    assert run(fewer, [device(0), device(1)], homes).decisions == ()


def test_each_move_that_soon_follows_another_doubles_the_wait() -> None:
    home = Home(W0, since=NOW - 200).moved(W1, NOW, cooldown=120.0)
    assert home == Home(W1, NOW, num_moves=1)
    assert home.moved(W0, NOW + 240, 120.0).num_moves == 2
    assert home.moved(W0, NOW + 1200, 120.0).num_moves == 0
    models = [model(n, 10, W0, compute=0.5, token_rate=1.0) for n in "ab"]
    for since, num_moves, count in ((NOW - 200, 0, 1), (NOW - 200, 1, 0), (NOW - 300, 1, 1)):
        homes = {name: (Home(W0, since, num_moves),) for name in "ab"}
        assert len(run(models, [device(0), device(1)], homes).decisions) == count


def test_what_is_not_in_memory_changes_its_home_for_nothing() -> None:
    models = [model("a", 10, W0, compute=0.9, token_rate=1.0), model("b", 10), model("c", 10, device=W0)]
    homes = {name: at(W0) for name in "abc"}
    plan = run(models, [device(0), device(1)], homes, Policy(max_moves=0))
    assert plan.decisions == (Rehome(ModelId("b"), W0, W1),)


def test_a_device_that_is_down_gets_nobody_and_keeps_its_own() -> None:
    plan = run([model("a"), model("b")], [device(0, is_up=False), device(1)], {"b": at(W0)})
    assert workers_of(plan, "a") == [W1]
    assert workers_of(run([model("a")], [device(0, is_up=False)]), "a") == [W0]


# --- room -----------------------------------------------------------------------------------------------


def test_live_models_that_do_not_fit_together_are_spread() -> None:
    models = [model(name, 40, token_rate=1.0) for name in "abc"]
    plan = run(models, [device(0), device(1)], {name: at(W0) for name in "abc"})
    assert len(plan.decisions) == 1 and plan.crowded == plan.infeasible == frozenset()
    floors = [replace(each, kv_floor_bytes=30) for each in models]
    plan = run(floors, [device(0), device(1)], {name: at(W0) for name in "abc"})
    assert len(plan.crowded) == 1 and len(plan.decisions) == 1


def test_what_can_never_fit_is_told() -> None:
    plan = run([model("a", 120, token_rate=1.0), model("b", 100)], [device(0), device(1, 110)])
    assert plan.infeasible == {"a"} and workers_of(plan, "a") == [W1] == workers_of(plan, "b")


@pytest.mark.parametrize("asked", [{}, {"token_rate": 1.0}])
def test_who_has_no_room_beside_pinned_models_goes_where_there_is_some(asked: dict[str, float]) -> None:
    """At once, whenever it was put there. It stayed for a cooldown, and each request for it got 503."""
    pinned = model("pin", 95, W0, is_pinned=True, is_wanted=True)
    homes = {"pin": at(W0), "a": at(W0, since=NOW - 1), "big": at(W1)}
    models = [pinned, model("a", 10, **asked), model("big", 95, W1, token_rate=1.0)]
    plan = run(models, [device(0), device(1)], homes)
    assert plan.decisions == (Rehome(ModelId("a"), W0, W1),) and not plan.shut_out
    assert plan.crowded == ({"a"} if asked else set())
    models[0] = replace(pinned, is_pinned=False)  # it gives way
    if not asked:
        assert run(models, [device(0), device(1)], homes).decisions == ()


def test_what_is_in_memory_beside_a_pinned_model_without_room_moves_at_once() -> None:
    """Its worker refused all that asked for it, and nothing made it leave."""
    pinned = model("pin", 95, W0, is_pinned=True, is_wanted=True)
    homes = {"pin": at(W0), "a": at(W0, since=NOW - 1)}
    for asked in ({}, {"token_rate": 1.0}):
        plan = run([pinned, model("a", 10, W0, **asked)], [device(0), device(1)], homes)
        assert plan.decisions == (Move(ModelId("a"), W0, W1, 0.0),)
    both = homes | {"a": at(W0, W1, since=NOW - 1)}
    plan = run([pinned, model("a", 10, W0, W1, token_rate=1.0)], [device(0), device(1)], both)
    assert plan.decisions == (Merge(ModelId("a"), W0),)


def test_a_pinned_model_without_a_floor_keeps_its_weights_alone() -> None:
    pinned = model("pin", 90, W0, is_pinned=True, is_wanted=True)
    plan = run([pinned, model("a", 9)], [device(0)], {"pin": at(W0), "a": at(W0)})
    assert not plan.shut_out
    assert run([pinned, model("a", 10)], [device(0)], {"pin": at(W0), "a": at(W0)}).shut_out == {"a"}


def test_a_home_without_room_beside_pinned_models_is_given_up_if_there_are_others() -> None:
    pinned = model("pin", 95, W0, is_pinned=True, is_wanted=True)
    homes = {"pin": at(W0), "a": at(W0, W1, since=NOW - 1)}
    plan = run([pinned, model("a", 10, W1, token_rate=1.0)], [device(0), device(1)], homes)
    assert plan.decisions == (Merge(ModelId("a"), W0),) and workers_of(plan, "a") == [W1]
    assert not plan.shut_out
    parts = run([pinned, model("a", 20, W1, tp=2)], [device(0), device(1)], homes)
    assert parts.decisions == () and parts.shut_out == {"a"}


def test_who_has_no_room_beside_pinned_models_anywhere_is_told() -> None:
    pins = [model(name, 95, at, is_pinned=True, is_wanted=True) for name, at in (("p", W0), ("q", W1))]
    homes = {"p": at(W0), "q": at(W1), "a": at(W0), "huge": at(W0), "b": at(W1)}
    models = [*pins, model("a", 10), model("huge", 101), model("b", 5, token_rate=1.0)]
    plan = run(models, [device(0, slab_bytes=5), device(1, slab_bytes=5)], homes)
    assert plan.decisions == ()
    assert (plan.shut_out, plan.infeasible, plan.crowded) == ({"a", "b"}, {"huge"}, set())
    models[0] = replace(models[0], weights_bytes=101)  # that one never comes, so it is in nobody's way
    plan = run(models, [device(0, slab_bytes=5), device(1, slab_bytes=5)], homes)
    assert plan.decisions == (Rehome(ModelId("b"), W1, W0),) and not plan.shut_out


def test_idle_models_reserve_nothing() -> None:
    models = [model(f"idle{i}", 60) for i in range(4)] + [model("a", 60, token_rate=1.0)]
    plan = run(models, [device(0)])
    assert plan.crowded == plan.infeasible == frozenset()


# --- several homes --------------------------------------------------------------------------------------


def test_a_model_that_fills_a_device_gets_another_and_gives_it_back() -> None:
    hot = model("a", 10, W0, compute=0.95, token_rate=5.0)
    devices = [device(0), device(1), device(2)]
    plan = run([hot], devices, {"a": at(W0)})
    assert plan.decisions == (Replicate(ModelId("a"), W1),) and workers_of(plan, "a") == [W0, W1]
    hotter = replace(hot, compute=1.9, resident=frozenset((W0, W1)))
    plan = run([hotter], devices, {"a": at(W0, W1)})
    assert plan.decisions == (Replicate(ModelId("a"), W2),)
    for compute, count in ((0.9, 0), (0.55, 0), (0.45, 1), (0.0, 1)):
        cooler = replace(hotter, compute=compute)
        merges = run([cooler], devices, {"a": at(W0, W1)}).decisions
        assert len(merges) == count and all(isinstance(each, Merge) for each in merges)


def test_a_model_whose_first_tokens_are_late_gets_another_home_however_idle_its_device() -> None:
    """Bursts of prompts on a device that was idle three quarters of the time stayed there for ten minutes."""
    bursty = model("a", 10, W0, compute=0.2, token_rate=5.0, late=0.02)
    devices = [device(0), device(1)]
    plan = run([bursty], devices, {"a": at(W0)})
    assert plan.decisions == (Replicate(ModelId("a"), W1),)
    assert isinstance(plan.decisions[0], Replicate) and plan.decisions[0].compute == 0.2
    assert run([replace(bursty, late=0.009)], devices, {"a": at(W0)}).decisions == ()
    busy = model("b", 10, W1, compute=0.3, token_rate=5.0, device=W1)
    assert run([bursty, busy], devices, {"a": at(W0), "b": at(W1)}).decisions == (), "no better there"
    both = [replace(bursty, compute=0.8), replace(busy, compute=0.2)]
    assert run(both, devices, {"a": at(W0), "b": at(W1)}).decisions == (), "not half free then"


def test_who_is_late_gets_another_home_wherever_it_was_just_put() -> None:
    """A 3B that had changed its home while nobody asked for it had to stay there alone for eight minutes,
    with nine of ten first tokens late, beside seven idle devices."""
    bursty = model("a", 10, W0, compute=0.2, token_rate=5.0, late=0.5)
    devices = [device(0), device(1), device(2)]
    home = Home(W0, NOW - 1, num_moves=2)
    assert run([bursty], devices, {"a": (home,)}).decisions == (Replicate(ModelId("a"), W1),)
    both = replace(bursty, resident=frozenset((W0, W1)))
    assert run([both], devices, {"a": at(W0, W1, since=NOW - 19)}).decisions == (), "its second may do yet"
    assert run([both], devices, {"a": at(W0, W1, since=NOW - 20)}).decisions == (Replicate(ModelId("a"), W2),)
    over = replace(both, is_still_late=False)
    assert run([over], devices, {"a": at(W0, W1, since=NOW - 20)}).decisions == (), "its second does"
    alone = replace(bursty, is_still_late=False)
    assert run([alone], devices, {"a": at(W0)}).decisions == (Replicate(ModelId("a"), W1),)


def test_who_is_late_does_not_try_in_each_round_what_has_just_failed() -> None:
    """A device that could not load the model was asked to every ten seconds."""
    late = model("a", 10, W0, compute=0.2, token_rate=5.0, late=0.5)
    devices = [device(0), device(1)]
    failed = Home(W0, NOW - 119, num_moves=1, has_failed=True)
    assert run([late], devices, {"a": (failed,)}).decisions == ()
    waited = replace(failed, since=NOW - 120)
    assert run([late], devices, {"a": (waited,)}).decisions == (Replicate(ModelId("a"), W1),)


def test_tight_objectives_of_tokens_keep_nobody_from_another_home() -> None:
    """They make much of the pressure of KV, which is no sign that a device has no time."""
    tight = model("a", 10, W0, compute=0.4, token_rate=5.0, late=0.5, kv_bytes_per_token=1, tpot=0.01)
    plan = run([tight], [device(0), device(1)], {"a": at(W0)})
    assert plan.pressures[W0] > 1.5 and plan.decisions == (Replicate(ModelId("a"), W1),)


def test_who_is_late_for_a_neighbours_steps_moves_instead() -> None:
    """With a second home half of its requests would still wait for them."""
    late = model("a", 10, W0, compute=0.05, token_rate=5.0, late=0.3, ttft=0.016, request_rate=5.0)
    long = model("b", 10, W0, token_rate=5.0, device=W0, **blocking(0.9, 0.032))
    kinds = [
        type(each) for each in run([late, long], [device(0), device(1)], {"a": at(W0), "b": at(W0)}).decisions
    ]
    assert kinds == [Move]
    own = replace(late, late=0.5)
    plan = run([own, long], [device(0), device(1)], {"a": at(W0), "b": at(W0)})
    assert Replicate(ModelId("a"), W1) in plan.decisions


def test_a_home_that_came_for_late_tokens_stays_while_as_much_is_asked_for() -> None:
    """A small share of time would do with one home; so it would go, and come back when tokens are late."""
    devices = [device(0), device(1)]
    for compute, count in ((0.2, 0), (0.11, 0), (0.09, 1)):
        calm = model("a", 10, W0, W1, compute=compute, token_rate=5.0, replicated_at=0.2)
        merges = run([calm], devices, {"a": at(W0, W1)}).decisions
        assert len(merges) == count and all(isinstance(each, Merge) for each in merges)


def test_a_replica_that_is_not_in_memory_is_the_first_to_go() -> None:
    cool = model("a", 10, W0, compute=0.1)
    other = model("b", 10, W0, compute=0.5)
    plan = run([cool, other], [device(0), device(1)], {"a": at(W0, W1), "b": at(W0)})
    assert plan.decisions[0] == Merge(ModelId("a"), W1)


def test_no_replica_where_it_helps_nobody() -> None:
    models = [model("a", 10, W0, compute=0.9), model("b", 10, W1, compute=0.84, device=W1)]
    assert run(models, [device(0), device(1)], {"a": at(W0), "b": at(W1)}).decisions == ()
    fixed = replace(models[0], device=W0)
    assert run([fixed], [device(0), device(1)], {"a": at(W0)}).decisions == ()


def test_parts_of_a_model_are_never_on_one_device() -> None:
    split = model("a", 160, tp=4, token_rate=1.0, compute=0.4)
    devices = [device(i) for i in range(5)]
    assert len(set(workers_of(run([split], devices), "a"))) == 4
    plan = run([split], devices[:3])
    assert len(set(workers_of(plan, "a"))) == 3 and plan.infeasible == {"a"}


# --- properties -----------------------------------------------------------------------------------------

NEEDS = st.builds(
    lambda weights, floor, rate, compute, tp, at, pinned: (weights, floor, rate, compute, tp, at, pinned),
    st.integers(1, 60),
    st.integers(0, 20),
    st.sampled_from([0.0, 0.0, 1.0, 20.0]),
    st.floats(0, 1.2),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(0, 5),
    st.sampled_from([False, False, False, True]),
)


@settings(max_examples=150)
@given(st.lists(NEEDS, min_size=1, max_size=14), st.lists(st.integers(30, 120), min_size=1, max_size=5))
def test_never_infeasible(
    needs: list[tuple[int, int, float, float, int, int, bool]], memories: list[int]
) -> None:
    """From any homes: moves go only where there is room, and in the end only the crowded lack it."""
    devices = [device(i, memory, slab_bytes=5) for i, memory in enumerate(memories)]
    models, homes = [], {}
    for i, (weights, floor, rate, compute, tp, place, pinned) in enumerate(needs):
        load = {"token_rate": rate, "compute": compute if rate else 0.0, "kv_floor_bytes": floor}
        load |= {"is_pinned": pinned, "is_wanted": pinned}
        resident = (devices[place].worker,) if place < len(devices) else ()
        if resident and tp == 1:
            homes[f"m{i}"] = at(*resident)
        models.append(model(f"m{i}", weights, *resident, tp=tp, kv_bytes_per_token=1, **load))
    policy = Policy(cooldown=0.0)
    for _ in range(60):
        plan = run(models, devices, homes, policy)
        check_plan(plan, models, devices, homes)
        models = [replace(m, resident=frozenset(h.worker for h in plan.homes[m.model])) for m in models]
        homes = {str(name): each for name, each in plan.homes.items()}
        if not plan.decisions:
            break
    assert not plan.decisions, "it comes to rest"
    for each in devices:
        live = [m for m in models if m.is_live and each.worker in workers_of(plan, m.model)]
        calm = [m for m in live if m.model not in plan.crowded | plan.infeasible | plan.shut_out]
        assert slabs(calm) * 5 <= each.memory_bytes, each


def slabs(models: list[ModelNeed]) -> int:
    return sum(
        math.ceil(m.weights_bytes / m.tp / 5) + max(1, math.ceil(m.kv_floor_bytes / m.tp / 5)) for m in models
    )


def check_plan(
    plan: Plan, models: list[ModelNeed], devices: list[DeviceState], before: dict[str, tuple[Home, ...]]
) -> None:
    memory = {each.worker: each.memory_bytes for each in devices}
    by_name = {each.model: each for each in models}
    for name, homes in plan.homes.items():
        workers = [home.worker for home in homes]
        assert workers and len(set(workers)) == len(workers)
        for worker in workers:
            assert name in plan.infeasible or slabs([by_name[name]]) * 5 <= memory[worker]
    targets = {d.target for d in plan.decisions if isinstance(d, Move | Replicate)}
    for worker in targets:
        live = [m for m in models if m.is_live and worker in workers_of(plan, m.model)]
        assert slabs(live) * 5 <= memory[worker], "something moved to where it has no room"


@pytest.mark.parametrize("seed", range(25))
def test_a_steady_load_keeps_models_still(seed: int) -> None:
    """Poisson arrivals seen through a window of 60 s; in 10 minutes after settling, one migration a model.

    Without the doubt that noise deserves, 33 of 120 runs moved a model twice.
    """
    rng = random.Random(seed)
    later = [each for now, each in changes(seed, rng.randint(2, 8), rng.randint(3, 24)) if now >= 600]
    moves = Counter(each.model for each in later if isinstance(each, Move | Merge))
    assert max(moves.values(), default=0) <= 1, later
    homes = {each.model for each in later if isinstance(each, Merge)}
    assert not homes & {each.model for each in later if isinstance(each, Replicate)}, "there and back"
    assert len(later) <= 3, later


def changes(seed: int, num_devices: int, num_models: int) -> list[tuple[float, Decision]]:
    """All migrations, replicas and merges of 20 minutes, from random homes on."""
    rng = random.Random(seed)
    devices = tuple(device(i, 1000, speed=rng.choice([1.0, 1.0, 2.0])) for i in range(num_devices))
    shares = [rng.paretovariate(1.2) for _ in range(num_models)]
    total = 0.75 * sum(each.speed for each in devices)
    works = [rng.choice([0.1, 0.5, 1.0]) for _ in shares]  # device seconds a request
    rates = [max(0.1, share / sum(shares) * total / work) for share, work in zip(shares, works, strict=True)]
    windows = [[poisson(rng, rate * 10) for _ in range(6)] for rate in rates]
    names = [ModelId(f"m{i}") for i in range(num_models)]
    homes = {name: at(rng.choice(devices).worker) for name in names}
    found: list[tuple[float, Decision]] = []
    for now in range(0, 1200, 10):
        needs = []
        for name, rate, work, window in zip(names, rates, works, windows, strict=True):
            window[:] = [*window[1:], poisson(rng, rate * 10)]
            seen = sum(window) / 60
            load = {"token_rate": 300 * seen, "compute": work * seen, "move_seconds": 1.0}
            load["noise"] = (sum(window) or 1) ** -0.5
            resident = (home.worker for home in homes[name])
            needs.append(model(name, 40, *resident, kv_bytes_per_token=1, **load))
        plan = decide(PlacementSnapshot(tuple(needs), devices, homes), float(now))
        homes = plan.homes
        found += [(now, decision) for decision in plan.decisions]
    return found


def poisson(rng: random.Random, mean: float) -> int:
    """How many exponential gaps fit."""
    count, left = 0, mean
    while (left := left - rng.expovariate(1)) > 0:
        count += 1
    return count


def test_a_thousand_models_on_256_devices_are_placed_quickly() -> None:
    """A first placement and a later round; time of this process, the best of three."""
    rng = random.Random(3)
    devices = [device(i, 80_000, slab_bytes=32, speed=rng.choice([1.0, 2.0])) for i in range(256)]
    models = []
    for i in range(1000):
        load = rng.paretovariate(1.1) / 20 if i % 2 else 0.0
        models.append(model(f"m{i}", rng.choice([2_000, 16_000, 30_000]), token_rate=50 * load, compute=load))
    empty = best_of_three(models, devices, {})
    homes = {str(name): each for name, each in run(models, devices).homes.items()}
    present = [replace(m, resident=frozenset(h.worker for h in homes[m.model])) for m in models]
    later = best_of_three(present, devices, homes, Policy(cooldown=0.0))
    print(f"first {empty * 1e3:.0f} ms, later {later * 1e3:.0f} ms")
    assert max(empty, later) < 0.3  # the goal is 100 ms, here with room for a slow or busy machine


def best_of_three(
    models: list[ModelNeed],
    devices: list[DeviceState],
    homes: dict[str, tuple[Home, ...]],
    policy: Policy = USUAL,
) -> float:
    times = []
    for _ in range(3):
        begin = time.process_time()
        run(models, devices, homes, policy)
        times.append(time.process_time() - begin)
    return min(times)
