from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prism.types import ModelId, Rank, RequestId
from prism.worker.offers import harm_of, offers_of
from prism.worker.reclaim import (
    MOST_PATIENCE,
    CancelLoad,
    DropOwnCache,
    EvictModel,
    Preempt,
    ReclaimDecision,
    TakeSlabs,
    decide,
    is_blocked,
    patience,
)
from prism.worker.snapshot import Holding, MemorySnapshot, Need, Running

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
NOW = 100.0


def rank(arrival: float, name: str = "r") -> Rank:
    return (arrival, RequestId(name), 0)


def running(arrival: float, blocks: int = 10, seconds: float = 1.0, slack: float = 0.0) -> Running:
    return Running(rank(arrival), blocks, seconds, slack)


def holding(model: ModelId, **values: Any) -> Holding:
    """A busy model with an old request that can give nothing up; ten blocks make a slab."""
    defaults = {
        "model": model,
        "is_active": True,
        "is_pinned": False,
        "kv_slabs": 3,
        "kv_floor": 0,
        "kv_limit": None,
        "blocks_per_slab": 10,
        "empty_slabs": 0,
        "gatherable_slabs": 0,
        "num_free_blocks": 0,
        "num_cached_blocks": 0,
        "block_seconds": 0.1,
        "reuse_chance": 0.5,
        "weight_slabs": 5,
        "load_seconds": 1.0,
        "return_chance": 0.5,
        "active_since": 0.0,
        "oldest_request": rank(1.0),
        "running": (running(1.0, 30),),
    }
    return Holding(**(defaults | values))


def cached(model: ModelId, slabs: int = 1, **values: Any) -> Holding:
    return holding(
        model, **({"gatherable_slabs": slabs, "num_cached_blocks": 10 * slabs, "running": ()} | values)
    )


def idle(model: ModelId, **values: Any) -> Holding:
    return holding(model, **({"oldest_request": None, "running": (), "kv_slabs": 0} | values))


def need(slabs: int = 1, arrival: float = 50.0, *, for_weights: bool = False, blocks: int = 10) -> Need:
    return Need(A, slabs, rank(arrival), for_weights, 0 if for_weights else blocks)


def ask(
    *holdings: Holding,
    wanted: Need | None = None,
    retiring: int = 0,
    unwanted: tuple[ModelId, ...] = (),
    expected: float = 0.0,
) -> tuple[ReclaimDecision, ...]:
    snapshot = MemorySnapshot(retiring, holdings, unwanted, 2.0, expected)
    return decide(snapshot, wanted or need(), NOW)


# --- what costs nothing ---------------------------------------------------------------------------------


def test_slabs_on_their_way_are_awaited() -> None:
    empty = holding(B, empty_slabs=1, gatherable_slabs=1)
    assert ask(empty, retiring=1) == ()
    assert ask(empty, retiring=1, unwanted=(C,)) == ()
    assert ask(empty, unwanted=(C,)) == (CancelLoad(C),)
    assert ask(empty) == (TakeSlabs(B, 1),)


def test_nobody_gives_more_than_is_missing() -> None:
    rich = holding(B, kv_slabs=9, empty_slabs=9, gatherable_slabs=9, running=())
    assert ask(rich, wanted=need(4)) == (TakeSlabs(B, 4),)
    assert ask(rich, wanted=need(4), retiring=3) == (TakeSlabs(B, 1),)


def test_who_may_not_displace_takes_what_nobody_needs() -> None:
    late = replace(need(4, for_weights=True), may_displace=False)
    young = holding(B, oldest_request=rank(60.0), running=(running(60.0, 30),))
    assert ask(young, wanted=late) == ()
    assert ask(young, wanted=replace(late, may_displace=True)) == (EvictModel(B),)
    assert ask(young, idle(C), wanted=late) == (EvictModel(C),)
    parts = replace(young, empty_slabs=2, gatherable_slabs=4, num_cached_blocks=20, kv_slabs=7)
    assert ask(parts, wanted=late) == (TakeSlabs(B, 4),)


def test_weights_are_blocked_by_what_is_older() -> None:
    """Not by what has not been here for long yet, is on its way, or may be stopped."""
    large, late = need(9, for_weights=True), rank(60.0)
    young = holding(B, oldest_request=late, running=(running(60.0, 30),), active_since=NOW)

    def blocked(*holdings: Holding, retiring: int = 0, wanted: Need = large) -> bool:
        return is_blocked(MemorySnapshot(retiring, holdings, (), 2.0), wanted, NOW)

    assert not blocked(young, holding(C, oldest_request=late, running=()))
    assert not blocked(young, holding(C, oldest_request=late, running=(), is_active=False))
    assert not blocked(young, idle(C))
    assert not blocked(young, retiring=1)
    assert not blocked(young, holding(C, kv_slabs=4, running=(running(1.0, 30), running(60.0, 10))))
    assert blocked(young)
    assert blocked(young, holding(C))
    assert blocked(young, holding(C, is_active=False))
    assert blocked(young, idle(C, is_pinned=True))
    assert blocked(young, retiring=1, wanted=replace(large, reserved=1))


def test_patience_grows_with_what_a_load_costs() -> None:
    assert patience(0.1, 60.0) == pytest.approx(2.0)
    assert patience(1.0, 60.0) == pytest.approx(20.0)
    assert patience(100.0, 600.0) == MOST_PATIENCE
    assert patience(100.0, 10.0) == 5.0, "else it is refused before others are stopped"


def test_floors_and_pins_hold() -> None:
    assert ask(cached(B, kv_floor=3)) == ()
    assert ask(holding(B, kv_slabs=3, kv_floor=2, running=(running(60.0, 30),)), wanted=need(3)) == (
        Preempt(B, 1),
        TakeSlabs(B, 1),
    )
    assert ask(idle(B, is_pinned=True), wanted=need(3, for_weights=True)) == ()


# --- who may take ---------------------------------------------------------------------------------------


def test_running_work_gives_way_only_to_older_requests() -> None:
    assert ask(holding(B, running=(running(49.0),), oldest_request=rank(49.0))) == ()
    younger = holding(B, running=(running(51.0),), oldest_request=rank(1.0))
    assert ask(younger) == (Preempt(B, 1), TakeSlabs(B, 1))


def test_of_one_arrival_only_one_gives_way() -> None:
    """Two requests of one moment took each other for younger, or neither did and both stood still."""
    mine, other = rank(50.0, "x"), rank(50.0, "y")
    theirs = holding(B, running=(Running(other, 10, 1.0, 0.0),))
    assert ask(theirs, wanted=Need(A, 1, mine, for_weights=False, blocks=10)) == (
        Preempt(B, 1),
        TakeSlabs(B, 1),
    )
    theirs = holding(B, running=(Running(mine, 10, 1.0, 0.0),))
    assert ask(theirs, wanted=Need(A, 1, other, for_weights=False, blocks=10)) == ()


def test_a_busy_model_leaves_for_an_older_request_only_after_a_while() -> None:
    busy = holding(B, kv_slabs=1, oldest_request=rank(60.0), running=())
    weights = need(6, for_weights=True)
    assert ask(busy, wanted=weights) == (EvictModel(B),)
    assert ask(holding(B, kv_slabs=1, oldest_request=rank(40.0), running=()), wanted=weights) == ()
    just_come = holding(B, kv_slabs=1, oldest_request=rank(60.0), running=(), active_since=NOW - 1)
    assert ask(just_come, wanted=weights) == ()


# --- who gives ------------------------------------------------------------------------------------------


def test_the_cheapest_that_suffices() -> None:
    """A slab of cache costs 0.5 s here, an idle model 0.5 s for five of them."""
    assert ask(cached(B, block_seconds=0.01), idle(C)) == (TakeSlabs(B, 1),)
    assert ask(cached(B, 3), idle(C), wanted=need(3)) == (EvictModel(C),)
    assert ask(cached(B, block_seconds=0.2), idle(C)) == (EvictModel(C),)


def test_what_is_not_needed_after_all_is_kept() -> None:
    """The cheap cache does not suffice, and the model that does makes it superfluous."""
    cheap = cached(B, block_seconds=0.01)
    assert ask(cheap, idle(C), wanted=need(5, for_weights=True)) == (EvictModel(C),)


def test_caches_go_by_cost_and_by_chance_of_reuse() -> None:
    cheap, dear = cached(B, block_seconds=0.1), cached(C, block_seconds=0.2)
    assert ask(dear, cheap) == (TakeSlabs(B, 1),)
    assert ask(cached(C, block_seconds=0.2, reuse_chance=0.1), cheap) == (TakeSlabs(C, 1),)


def test_idle_models_go_by_time_to_load_and_by_chance_of_return() -> None:
    assert ask(idle(B, return_chance=0.2), idle(C)) == (EvictModel(B),)
    assert ask(idle(B, return_chance=0.2, load_seconds=9.0), idle(C)) == (EvictModel(C),)


def test_sequences_go_by_slack() -> None:
    late = holding(B, running=(running(60.0, slack=0.0),))
    ahead = holding(C, running=(running(60.0, slack=5.0),))
    assert ask(late, ahead) == (Preempt(C, 1), TakeSlabs(C, 1))
    assert harm_of(running(0.0, seconds=2.0, slack=0.5)) == 3.5


def test_a_whole_model_does_not_go_for_one_block_unless_more_is_wanted() -> None:
    small = cached(B, block_seconds=0.02)  # 0.1 s for a slab; the model 0.5 s for five
    assert ask(small, idle(C, return_chance=0.4)) == (TakeSlabs(B, 1),)
    assert ask(small, idle(C, return_chance=0.4), expected=10.0) == (EvictModel(C),)


def test_what_is_asked_back_at_once_goes_last() -> None:
    """A sequence that had slack was cheap to preempt, and wanted its slab back with the next step."""
    younger = holding(B, running=(running(60.0, seconds=0.001, slack=9.0),))
    assert ask(younger, idle(C)) == (EvictModel(C),)
    assert ask(younger, cached(C)) == (TakeSlabs(C, 1),)


def test_several_sequences_may_have_to_go_for_one_slab() -> None:
    crowd = holding(B, running=tuple(running(60.0 + i, 4) for i in range(7)))
    assert ask(crowd) == (Preempt(B, 3), TakeSlabs(B, 1))


def test_a_dear_cache_may_stand_before_cheap_weights() -> None:
    hoard = idle(B, kv_slabs=1, gatherable_slabs=1, num_cached_blocks=10, block_seconds=0.2, weight_slabs=50)
    others = cached(C, 3, block_seconds=0.1)
    assert ask(hoard, others, wanted=need(20, for_weights=True)) == (EvictModel(B),)


def test_its_own_cache_and_its_own_young_sequences_are_offers_too() -> None:
    own = holding(A, num_cached_blocks=20, block_seconds=0.01)
    assert ask(own, cached(B)) == (DropOwnCache(A, 10),)
    assert ask(holding(A, num_cached_blocks=20, block_seconds=0.5), cached(B)) == (TakeSlabs(B, 1),)
    mine = holding(A, running=(running(50.0), running(60.0, 10, slack=9.0)))
    theirs = holding(B, running=(running(70.0),))
    assert ask(mine, theirs) == (Preempt(A, 1),)


def test_at_its_limit_a_model_recycles_its_own_cache() -> None:
    rich = holding(B, empty_slabs=2, gatherable_slabs=2)
    assert ask(holding(A, kv_limit=3, num_cached_blocks=5), rich) == (DropOwnCache(A, 5),)
    assert ask(holding(A, kv_limit=3), rich) == ()


def test_who_begins_again_stops_nobody_for_what_its_limit_does_not_leave() -> None:
    """It took slabs of others for a part, could not begin with it, and they took them back."""
    again = replace(need(blocks=20), is_again=True)
    neighbour = holding(B, gatherable_slabs=5, empty_slabs=5)
    close = holding(A, kv_limit=4, num_cached_blocks=5)
    assert ask(replace(close, kv_limit=5), neighbour, wanted=again), "the limit leaves two slabs"
    assert ask(close, neighbour, wanted=again) == (), "five blocks do not make up for ten"
    young = replace(close, running=(running(60.0, 6),))
    assert ask(young, neighbour, wanted=again) == (DropOwnCache(A, 5),)
    assert ask(holding(A, kv_limit=4, running=(running(60.0, 12),)), wanted=again) == (Preempt(A, 1),)


def test_at_its_limit_an_old_sequence_takes_from_its_models_young_ones() -> None:
    """It waited until they had ended."""
    crowd = (running(1.0, 5), *(running(60.0 + i, 5) for i in range(4)))
    assert ask(holding(A, kv_limit=3, running=crowd)) == (Preempt(A, 2),)
    assert ask(holding(A, kv_limit=3, running=crowd), wanted=need(blocks=99)) == (Preempt(A, 4),)
    assert ask(holding(A, kv_limit=3, running=crowd[:1])) == ()


def test_weights_take_nothing_in_vain() -> None:
    """Everything younger was preempted for a model that did not fit all the same, at each attempt."""
    younger = holding(B, running=(running(60.0),))
    old = holding(C)
    assert ask(younger, old, wanted=need(3, for_weights=True)) == ()
    assert ask(younger, old, wanted=need(1, for_weights=True)) == (Preempt(B, 1), TakeSlabs(B, 1))
    assert ask(younger, old, wanted=need(3, blocks=30)) == (Preempt(B, 1), TakeSlabs(B, 1)), "KV takes any"


def test_who_begins_again_takes_nothing_in_vain() -> None:
    """One took what another had computed, could not begin all the same, and others took it: 126 s of prompts
    were computed again on four simulated devices in 300 s."""
    younger, old = holding(B, running=(running(60.0),)), holding(C)
    again = replace(need(3, blocks=30), is_again=True)
    assert ask(younger, old, wanted=again) == ()
    assert ask(younger, old, wanted=replace(again, slabs=1)) == (Preempt(B, 1), TakeSlabs(B, 1))


def test_what_a_sequence_is_going_to_find_is_not_dropped_for_it() -> None:
    own = cached(A, 2, kv_limit=9)
    assert ask(own, wanted=replace(need(1, blocks=8), is_again=True, num_found=15)) == ()
    assert ask(own, wanted=replace(need(1, blocks=8), is_again=True, num_found=12)) == (DropOwnCache(A, 8),)
    assert ask(replace(own, kv_limit=3), wanted=replace(need(1, blocks=8), num_found=15)) == (
        DropOwnCache(A, 5),
    )


def test_a_model_of_many_sequences_is_offered_in_few_parts() -> None:
    """Hundreds of sequences were weighed one by one."""
    many = holding(B, kv_slabs=200, running=tuple(running(60.0 + i, 10) for i in range(200)))
    snapshot = MemorySnapshot(0, (many,), (), 2.0)
    assert len(offers_of(many, need(160), snapshot, NOW)) <= 20


# --- in general -----------------------------------------------------------------------------------------

sequences = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 30), st.floats(0, 2)), max_size=6)


@st.composite
def holdings(draw: st.DrawFn, model: ModelId) -> Holding:
    items = sorted({arrival: (b, s) for arrival, b, s in draw(sequences)}.items())
    runs = tuple(Running(rank(float(a), model), b, s, 0.0) for a, (b, s) in items)
    used = sum(r.num_blocks for r in runs)
    free, kept = draw(st.integers(0, 25)), draw(st.integers(0, 25))
    slabs = -(-(used + free + kept) // 10)
    free = slabs * 10 - used - kept
    gatherable = (free + kept) // 10
    return holding(
        model,
        kv_slabs=slabs,
        kv_floor=draw(st.integers(0, 2)),
        is_pinned=draw(st.booleans()),
        empty_slabs=draw(st.integers(0, gatherable)),
        gatherable_slabs=gatherable,
        num_free_blocks=free,
        num_cached_blocks=kept,
        oldest_request=runs[0].rank if runs else None,
        running=runs,
        return_chance=draw(st.floats(0, 1)),
        load_seconds=draw(st.floats(0, 3)),
    )


@given(
    b=holdings(B), c=holdings(C), slabs=st.integers(1, 12), arrival=st.integers(0, 99), weights=st.booleans()
)
def test_the_rules_hold_for_all(b: Holding, c: Holding, slabs: int, arrival: int, weights: bool) -> None:
    wanted = need(slabs, float(arrival), for_weights=weights)
    decisions = ask(b, c, wanted=wanted)
    assert decisions == ask(c, b, wanted=wanted), "the order of the models does not matter"
    gain = 0
    for one in (b, c):
        mine = [d for d in decisions if d.model == one.model]
        if any(isinstance(d, EvictModel) for d in mine):
            assert len(mine) == 1 and not one.is_pinned
            assert one.oldest_request is None or one.oldest_request > wanted.rank
            gain += one.weight_slabs + one.kv_slabs
        for decision in mine:
            if isinstance(decision, Preempt):
                assert all(r.rank > wanted.rank for r in one.running[-decision.count :])
            if isinstance(decision, TakeSlabs):
                assert 0 < decision.slabs <= max(0, one.kv_slabs - one.kv_floor)
                gain += decision.slabs
    assert not weights or not decisions or gain >= slabs, "in vain"


def test_evictions_come_last() -> None:
    """They wait for queued steps, which may end the young sequences that others were to give up."""
    young = holding(C, running=(running(1.0), running(60.0, 10, 0.1)))
    decisions = ask(idle(B), young, wanted=need(6, for_weights=True))
    assert decisions == (Preempt(C, 1), TakeSlabs(C, 1), EvictModel(B))


def test_of_what_does_no_harm_empty_slabs_go_first() -> None:
    """A model past the idle threshold left though others had empty slabs, if its name came first."""
    past, empty = idle(B, return_chance=0.0), holding(C, empty_slabs=1, gatherable_slabs=1)
    assert ask(past, empty) == (TakeSlabs(C, 1),)
    assert ask(past, empty, wanted=need(5)) == (EvictModel(B),), (
        "and are no reason to take more than is missing"
    )


def test_limits_of_a_need_are_checked_against_what_there_is() -> None:
    assert ask(wanted=need(1)) == ()
    with pytest.raises(AssertionError):
        assert ask(holding(B)) != ()
