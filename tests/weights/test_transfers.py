"""Bytes arrive whole, in order, and never unnoticed otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism.errors import CheckpointError
from prism.types import Address, Bytes, MiB
from prism.weights import copiers
from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights
from prism.weights.copiers import HostCopier
from prism.weights.link import Traffic
from prism.weights.places import Places
from prism.weights.registrations import Registered
from prism.weights.transfers import Transfer
from tests.weights.support import SLAB, Slabs, carry


@pytest.mark.parametrize("slab_bytes", [SLAB, 4 * SLAB, 16 * SLAB])
@pytest.mark.parametrize("chunk_bytes", [SLAB // 2, SLAB, 4 * SLAB])
def test_all_bytes_arrive_and_no_others(packed: PackedWeights, slab_bytes: int, chunk_bytes: int) -> None:
    slabs = Slabs(packed, Bytes(slab_bytes))
    transfer = carry(Transfer(packed, slabs.places), HostCopier(Bytes(chunk_bytes)))
    assert transfer.error is None and transfer.has_arrived
    assert (slabs.content() == packed.data).all()


def test_what_has_arrived_never_runs_ahead_of_the_bytes(packed: PackedWeights) -> None:
    slabs = Slabs(packed)
    transfer = Transfer(packed, slabs.places)
    traffic = Traffic(HostCopier(Bytes(MiB)))
    traffic.add(transfer)
    seen = [transfer.arrived]
    while traffic.step():
        seen.append(transfer.arrived)
        assert (slabs.content()[: transfer.arrived] == packed.data[: transfer.arrived]).all()
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == packed.total_bytes
    assert len(set(seen)) > 20


def test_a_cancelled_transfer_stops_between_pieces(packed: PackedWeights) -> None:
    slabs = Slabs(packed)
    transfer = Transfer(packed, slabs.places)
    traffic = Traffic(HostCopier(SLAB))
    traffic.add(transfer)
    while transfer.arrived < 3 * SLAB:
        traffic.step()
    transfer.cancel()
    while traffic.step():
        pass
    assert transfer.has_ended.is_set() and transfer.error is None and not transfer.has_arrived
    assert transfer.arrived == 3 * SLAB and not slabs.content()[4 * SLAB :].any()


def test_a_transfer_cancelled_beforehand_copies_nothing(packed: PackedWeights) -> None:
    slabs = Slabs(packed)
    transfer = Transfer(packed, slabs.places)
    transfer.cancel()
    carry(transfer)
    assert transfer.arrived == 0 and not slabs.content().any()


@pytest.mark.parametrize("place", [0, CHUNK_BYTES - 1, 3 * CHUNK_BYTES + 77, -1])
def test_a_byte_that_changes_on_the_way_is_noticed(
    packed: PackedWeights, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    """The checksum is that of the bytes on the device, not of those that were read."""
    slabs = Slabs(packed)
    place %= packed.total_bytes
    at = slabs.places.slabs[place // SLAB] + place % SLAB
    copy = np.copyto

    def flip_behind(to: np.ndarray, source: np.ndarray) -> None:
        copy(to, source)
        if to.ctypes.data <= at < to.ctypes.data + len(to):
            to[at - to.ctypes.data] ^= 1

    monkeypatch.setattr(np, "copyto", flip_behind)
    transfer = carry(Transfer(packed, slabs.places))
    begin = place // CHUNK_BYTES * CHUNK_BYTES
    assert isinstance(transfer.error, CheckpointError)
    assert str(transfer.error).endswith(f"packed m: 1 of 6 chunks arrived damaged, the first at byte {begin}")


@pytest.mark.parametrize("registered", [0, 3 * SLAB, 3 * SLAB + 1, None])
def test_what_is_registered_is_copied_from_there(
    packed: PackedWeights, monkeypatch: pytest.MonkeyPatch, registered: int | None
) -> None:
    """All of it, the beginning, or nothing; a piece that is registered in part counts as not registered."""
    size = Bytes(packed.total_bytes if registered is None else registered)
    elsewhere = torch.from_numpy(packed.data.copy())
    seen = []

    def watch(piece: copiers.Piece) -> copiers.Piece:
        base = elsewhere.data_ptr() if piece.is_registered else packed.address
        assert piece.source == base + piece.begin
        seen.append(piece.is_registered)
        return piece

    take = Transfer.take_piece
    monkeypatch.setattr(Transfer, "take_piece", lambda transfer, chunk: watch(take(transfer, chunk)))
    slabs = Slabs(packed)
    transfer = Transfer(packed, slabs.places, Registered(Address(elsewhere.data_ptr()), size, None))
    carry(transfer)
    assert transfer.error is None and (slabs.content() == packed.data).all()
    num_registered = 11 if registered is None else registered // SLAB
    assert seen == [True] * num_registered + [False] * (11 - num_registered)


def test_too_few_slabs_are_a_bug(packed: PackedWeights) -> None:
    places = Slabs(packed).places
    with pytest.raises(AssertionError, match="too few"):
        Transfer(packed, Places(places.slabs[:-1], SLAB))
