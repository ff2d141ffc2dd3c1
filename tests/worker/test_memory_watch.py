"""A device's memory as it says itself, beside what is counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prism.errors import DriverError
from prism.memory.driver import MemoryInfo
from prism.memory.ledger import Ledger
from prism.types import Bytes, GiB, MiB
from prism.worker.memory_watch import MOST_GROWTH, MemoryWatch
from tests.support.local_worker import SLAB, LocalWorker


class Account:
    """A device of 64 GiB that says how much is used."""

    def __init__(self) -> None:
        self.used = Bytes(0)
        self.driver = self

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(Bytes(64 * GiB - self.used), Bytes(64 * GiB))

    def ledger(self) -> Ledger:
        return Ledger(SLAB, 8, 8, 0, {}, Bytes(8 * SLAB))


def test_memory_that_nobody_counts_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    account: Any = Account()
    watch = MemoryWatch(account, "worker-0")
    account.used = 8 * SLAB + 700 * MiB
    with caplog.at_level(logging.WARNING):
        watch.look()
        assert watch.unaccounted == 700 * MiB
        account.used += MOST_GROWTH
        watch.look()
        assert not caplog.text
        account.used += 1 * MiB
        watch.look()
        watch.look()
    assert watch.unaccounted == 701 * MiB + MOST_GROWTH
    told = f"{(701 * MiB + MOST_GROWTH) // MiB} MiB of the device are used that nobody counts, 257 MiB more"
    assert len(caplog.records) == 1 and told in caplog.text


def test_what_comes_again_after_it_had_gone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    account: Any = Account()
    watch = MemoryWatch(account, "worker-0")
    with caplog.at_level(logging.WARNING):
        for more in (GiB, 0, GiB):
            account.used = Bytes(8 * SLAB + more)
            watch.look()
    assert len(caplog.records) == 1


def test_slabs_whose_pages_nobody_has_touched_are_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    account: Any = Account()
    watch = MemoryWatch(account, "worker-0")
    for used in (0, 8 * SLAB, 0):
        account.used = Bytes(used)
        watch.look()
        assert watch.unaccounted == 0


def test_a_device_that_does_not_answer_is_told_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    account: Any = Account()
    watch = MemoryWatch(account, "worker-0")
    account.used = 8 * SLAB + MiB
    watch.look()

    def fail() -> MemoryInfo:
        raise DriverError("cuMemGetInfo", "injected")

    account.memory_info = fail
    watch.look()
    assert watch.unaccounted == MiB and "does not say how much" in caplog.text


@pytest.fixture
def local() -> Iterator[LocalWorker]:
    worker = LocalWorker({"m": Path("nowhere")}, 8)
    yield worker
    worker.close()


def test_a_worker_counts_graphs_and_what_torch_holds(
    local: LocalWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = local.device.pool.physical_bytes
    usage = property(lambda _: SimpleNamespace(num_graphs=2, num_bytes=Bytes(3 * MiB)))
    monkeypatch.setattr(type(local.device.backend), "graph_usage", usage)
    monkeypatch.setattr(type(local.device.backend), "torch_bytes", property(lambda _: Bytes(5 * MiB)))
    assert local.device.ledger().counted == pool + 8 * MiB
    local.device.ledger().check(MemoryInfo(Bytes(GiB - pool - 8 * MiB), GiB))
