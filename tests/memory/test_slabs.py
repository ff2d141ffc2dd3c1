from __future__ import annotations

import pytest

from prism.errors import OutOfSlabs
from prism.memory.slabs import KvOwner, LaneOwner, SlabAccounts, WeightsOwner
from prism.types import LaneId, ModelId, SlabId, Stamp

A, B = KvOwner(ModelId("a")), WeightsOwner(ModelId("b"))
LANE = LaneId(0)


def new_accounts(num_slabs: int = 4, max_slabs: int = 6) -> SlabAccounts:
    accounts = SlabAccounts(max_slabs)
    accounts.add(accounts.absent(num_slabs))
    return accounts


def test_the_lowest_slabs_are_taken_first() -> None:
    accounts = new_accounts()
    assert accounts.take(A, 2) == (0, 1)
    assert accounts.take(B, 1) == (2,)
    accounts.give_back(A, [SlabId(0)], None)
    assert accounts.take(B, 2) == (0, 3)
    assert accounts.owners() == {A: 1, B: 3}
    accounts.check()


def test_too_many_are_refused_and_none_taken() -> None:
    accounts = new_accounts()
    with pytest.raises(OutOfSlabs, match="5 slabs wanted, 4 free"):
        accounts.take(A, 5)
    assert accounts.num_free == 4 and accounts.owners() == {}
    accounts.check()


def test_a_stamped_slab_is_free_once_its_step_has_completed() -> None:
    accounts = new_accounts()
    slabs = accounts.take(A, 3)
    accounts.give_back(A, slabs[:1], Stamp(LANE, 7))
    accounts.give_back(A, slabs[1:2], Stamp(LANE, 5))
    accounts.give_back(A, slabs[2:], Stamp(LaneId(1), 1))
    assert accounts.num_retiring == 3 and accounts.owners() == {}
    assert accounts.completed(LANE, 6) == 1
    assert accounts.free_slabs() == (1, 3)
    assert accounts.completed(LANE, 7) == 1
    assert accounts.free_slabs() == (0, 1, 3)
    accounts.check()


def test_a_stamp_that_has_completed_already_frees_at_once() -> None:
    """Otherwise the slab would wait for a step that an idle lane never queues."""
    accounts = new_accounts()
    accounts.completed(LANE, 3)
    accounts.give_back(A, accounts.take(A, 1), Stamp(LANE, 3))
    assert accounts.num_free == 4
    accounts.check()


def test_nobody_gives_back_what_is_not_theirs() -> None:
    accounts = new_accounts()
    slabs = accounts.take(A, 1)
    for owner in (B, LaneOwner(LANE)):
        with pytest.raises(AssertionError):
            accounts.give_back(owner, slabs, None)


def test_taking_none_leaves_no_owner() -> None:
    accounts = new_accounts()
    assert accounts.take(A, 0) == ()
    assert accounts.owners() == {}
    accounts.check()


def test_memory_comes_and_goes() -> None:
    accounts = new_accounts()
    accounts.take(A, 2)
    accounts.remove(SlabId(3))
    with pytest.raises(AssertionError):
        accounts.remove(SlabId(0))
    assert accounts.num_slabs == 3
    assert accounts.absent(3) == (3, 4, 5)
    with pytest.raises(AssertionError, match="limit of 6"):
        accounts.absent(4)
    accounts.add(accounts.absent(1))
    assert accounts.free_slabs() == (2, 3)
    accounts.check()


def test_check_notices_a_lost_slab() -> None:
    accounts = new_accounts()
    accounts._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        accounts.check()
