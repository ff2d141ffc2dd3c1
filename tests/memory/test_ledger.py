from __future__ import annotations

from dataclasses import replace

import pytest

from prism.memory.driver import MemoryInfo
from prism.memory.ledger import Ledger
from prism.memory.slabs import KvOwner
from prism.types import Bytes, MiB, ModelId

SLAB = Bytes(2 * MiB)
LEDGER = Ledger(
    slab_bytes=SLAB,
    num_slabs=10,
    num_free=5,
    num_retiring=2,
    slabs_by_owner={KvOwner(ModelId("a")): 3},
    pool_bytes=Bytes(10 * SLAB),
    graph_bytes=Bytes(4 * MiB),
    reserves={"torch": Bytes(16 * MiB)},
)


def reported(used: int) -> MemoryInfo:
    return MemoryInfo(Bytes(100 * MiB - used), Bytes(100 * MiB))


def test_everything_counted_adds_up() -> None:
    assert LEDGER.counted == 40 * MiB
    LEDGER.check(reported(40 * MiB))


def test_memory_that_nobody_counts_is_noticed_either_way() -> None:
    for used in (41 * MiB, 39 * MiB):
        LEDGER.check(reported(used), Bytes(MiB))
        with pytest.raises(AssertionError, match="unaccounted"):
            LEDGER.check(reported(used), Bytes(MiB - 1))


def test_a_lost_slab_is_noticed() -> None:
    with pytest.raises(AssertionError, match="9 slabs found of 10"):
        replace(LEDGER, num_free=4).check(reported(40 * MiB))


def test_a_pool_smaller_than_its_slabs_is_noticed() -> None:
    with pytest.raises(AssertionError, match="less than its slabs"):
        replace(LEDGER, pool_bytes=SLAB).check(reported(22 * MiB))
