"""Who gets the next piece of the link, and that nobody's trouble is another's. Nothing is copied here."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from prism.types import Address, Bytes, MiB
from prism.weights.client import PackedWeights
from prism.weights.copiers import Copy, HostCopier, Piece, Wait
from prism.weights.link import Candidate, ThreadLink, Traffic, choose
from prism.weights.places import Places
from prism.weights.transfers import NEVER, Transfer
from tests.support.waiting import PATIENCE, wait_until

SLAB = Bytes(2 * MiB)


class FakeCopier:
    """Copies nothing, and knows what is on its way. All pieces of transfer i have targets from i TiB on."""

    def __init__(self, packed: PackedWeights, depth: int = 2) -> None:
        self.depth = depth
        self.chunk_bytes = Bytes(MiB)
        self.packed = packed
        self.order: list[int] = []
        self.flying: list[int] = []
        self.num_settled = 0
        self.bad_copy: int | None = None
        self.bad_wait: int | None = None

    def begin(self, total: Bytes, places: Places) -> Copy:
        return FakeCopy(self)

    def settle(self) -> None:
        self.num_settled += 1

    def transfer(self, number: int, deadline: float = NEVER) -> Transfer:
        slabs = -(-self.packed.total_bytes // SLAB)
        places = Places(tuple(Address((number << 40) + i * SLAB) for i in range(slabs)), SLAB)
        return Transfer(self.packed, places, deadline=deadline)

    @property
    def num_pieces(self) -> int:
        return -(-self.packed.total_bytes // MiB)


class FakeCopy:
    def __init__(self, copier: FakeCopier) -> None:
        self._copier = copier

    def copy(self, piece: Piece) -> Wait:
        copier, number = self._copier, piece.target >> 40
        copier.order.append(number)
        if number == copier.bad_copy:
            raise RuntimeError("cannot queue")
        copier.flying.append(number)
        assert len(copier.flying) <= copier.depth

        def wait() -> None:
            assert copier.flying.pop(0) == number, "not in order"
            if number == copier.bad_wait:
                copier.bad_wait = None
                raise RuntimeError("did not arrive")

        return wait

    def checksums(self) -> NDArray[np.uint64]:
        return self._copier.packed.checksums.copy()


@pytest.fixture
def copier(packed: PackedWeights) -> FakeCopier:
    return FakeCopier(packed)


@pytest.fixture
def traffic(copier: FakeCopier) -> Traffic:
    return Traffic(copier)


def run(traffic: Traffic, steps: int = 10**6) -> None:
    for _ in range(steps):
        if not traffic.step():
            return


def test_the_earliest_deadline_goes_first(copier: FakeCopier, traffic: Traffic) -> None:
    for number, deadline in ((1, NEVER), (2, 20.0), (3, 10.0)):
        traffic.add(copier.transfer(number, deadline))
    run(traffic)
    assert copier.order == [3] * copier.num_pieces + [2] * copier.num_pieces + [1] * copier.num_pieces


def test_equals_take_turns(copier: FakeCopier, traffic: Traffic) -> None:
    for number in (1, 2, 3):
        traffic.add(copier.transfer(number))
    run(traffic)
    assert copier.order == [1, 2, 3] * copier.num_pieces


def test_what_becomes_urgent_waits_only_for_what_is_on_its_way(copier: FakeCopier, traffic: Traffic) -> None:
    transfers = [copier.transfer(number) for number in (1, 2)]
    traffic.add(transfers[0])
    run(traffic, 5)
    traffic.add(transfers[1])
    transfers[1].deadline = 1.0
    before = len(copier.order)
    run(traffic, copier.depth + 1)
    assert copier.order[before] == 2
    run(traffic)
    assert copier.order[before : before + copier.num_pieces] == [2] * copier.num_pieces
    assert all(transfer.has_arrived for transfer in transfers)


def test_the_link_is_kept_busy_and_no_busier(copier: FakeCopier, traffic: Traffic) -> None:
    traffic.add(copier.transfer(1))
    run(traffic, copier.depth)
    for _ in range(10):
        assert len(copier.flying) >= copier.depth - 1
        traffic.step()


@pytest.mark.parametrize("fault", ["bad_copy", "bad_wait"])
def test_a_failure_ends_its_transfer_alone(copier: FakeCopier, traffic: Traffic, fault: str) -> None:
    transfers = [copier.transfer(number) for number in (1, 2, 3)]
    for transfer in transfers:
        traffic.add(transfer)
    run(traffic, 20)
    setattr(copier, fault, 2)
    before = transfers[1].arrived
    run(traffic)
    assert [transfer.error is None for transfer in transfers] == [True, False, True]
    assert all(transfer.has_ended.is_set() for transfer in transfers)
    assert transfers[0].has_arrived and transfers[2].has_arrived
    assert before <= transfers[1].arrived <= before + 2 * MiB
    assert copier.num_settled == 1, "a piece that failed may be on its way all the same"


def test_what_follows_a_lost_piece_has_not_arrived(copier: FakeCopier, traffic: Traffic) -> None:
    """All that lies below `arrived` may be read, and the piece behind the lost one is still on its way."""
    transfer = copier.transfer(1)
    traffic.add(transfer)
    run(traffic, 6)
    before = transfer.arrived
    assert len(copier.flying) == copier.depth == 2 and before
    copier.bad_wait = 1
    run(traffic)
    assert transfer.arrived == before and not copier.flying
    assert str(transfer.error) == "did not arrive"


def test_nothing_has_ended_while_a_piece_of_it_is_on_its_way(copier: FakeCopier, traffic: Traffic) -> None:
    transfer = copier.transfer(1)
    traffic.add(transfer)
    run(traffic, 2)
    assert len(copier.flying) == 2
    transfer.cancel()
    while traffic.step():
        assert transfer.has_ended.is_set() == (not copier.flying)
    assert transfer.has_ended.is_set()


@given(st.lists(st.tuples(st.sampled_from((1.0, 2.0, NEVER)), st.integers(0, 5)), min_size=1))
def test_choice_is_by_deadline_then_by_the_longest_wait(pairs: list[tuple[float, int]]) -> None:
    chosen = pairs[choose([Candidate(*pair) for pair in pairs])]
    assert chosen[0] == min(deadline for deadline, _ in pairs)
    assert chosen[1] == min(turn for deadline, turn in pairs if deadline == chosen[0])


def test_a_thread_carries_what_is_started_and_ends(packed: PackedWeights, tmp_path: Path) -> None:
    slabs = np.zeros((2, 11, SLAB), np.uint8)
    link = ThreadLink(HostCopier(SLAB))
    for target in slabs:
        transfer = Transfer(packed, Places(tuple(Address(slab.ctypes.data) for slab in target), SLAB))
        link.start(transfer)
        link.wait(transfer)
        assert transfer.error is None
        assert (target.reshape(-1)[: packed.total_bytes] == packed.data).all()
    link.close()


def test_a_busy_thread_does_not_keep_the_link_waiting(packed: PackedWeights) -> None:
    """It did, for 5 ms a piece, while a piece took half of one."""
    copier = FakeCopier(packed, depth=1)
    fly = FakeCopy.copy

    class TimedCopy(FakeCopy):
        def copy(self, piece: Piece) -> Wait:
            land = fly(self, piece)

            def wait() -> None:
                time.sleep(0.0005)
                land()

            return wait

    copier.begin = lambda *_: TimedCopy(copier)  # type: ignore[method-assign]
    link, transfer = ThreadLink(copier), copier.transfer(1)
    begin = time.perf_counter()
    link.start(transfer)
    while not transfer.has_ended.is_set():
        sum(range(1000))
    seconds = time.perf_counter() - begin
    link.close()
    assert transfer.has_arrived and seconds / copier.num_pieces < 0.003


def test_closing_ends_what_is_on_its_way(packed: PackedWeights) -> None:
    copier = FakeCopier(packed)
    is_copying, may_go_on = threading.Event(), threading.Event()
    fly = FakeCopy.copy

    class SlowCopy(FakeCopy):
        def copy(self, piece: Piece) -> Wait:
            wait = fly(self, piece)
            is_copying.set()
            assert may_go_on.wait(PATIENCE)
            return wait

    copier.begin = lambda *_: SlowCopy(copier)  # type: ignore[method-assign]
    link, transfer = ThreadLink(copier), copier.transfer(1)
    link.start(transfer)
    assert is_copying.wait(PATIENCE)
    closing = threading.Thread(target=link.close)
    closing.start()
    wait_until(lambda: link._is_closing, "it is being closed")
    may_go_on.set()
    closing.join()
    assert transfer.has_ended.is_set() and not transfer.has_arrived and not copier.flying
    late = copier.transfer(2)
    link.start(late)
    link.wait(late)
    assert late.is_cancelled


def test_what_has_not_begun_ends_with_the_link(copier: FakeCopier, traffic: Traffic) -> None:
    """It was cancelled, and whoever waited for it waited for ever."""
    transfer = copier.transfer(1)
    traffic.add(transfer)
    traffic.cancel_all()
    assert transfer.has_ended.is_set() and not transfer.has_arrived
    assert not traffic.step() and not copier.order
