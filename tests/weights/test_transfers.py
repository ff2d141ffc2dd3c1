"""Bytes arrive whole, in order, and never unnoticed otherwise."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from prism.errors import CheckpointError
from prism.memory import memfd
from prism.memory.tensors import tensor_at
from prism.types import Address, Bytes, MiB
from prism.weights import copiers
from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights, pack_here
from prism.weights.copiers import Copier, CudaCopier, HostCopier
from prism.weights.link import Traffic
from prism.weights.registrations import Registered
from prism.weights.transfers import Places, Transfer
from tests.weights.support import dummy_source

SLAB = Bytes(2 * MiB)  # half a checksum's chunk


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedWeights]:
    """Some 21 MB: six chunks, the last one short; eleven slabs."""
    source = dummy_source(
        tmp_path_factory.mktemp("weights"), vocab_size=6000, hidden_size=512, intermediate_size=1024
    )
    with pack_here(source) as packed:
        assert 5 * CHUNK_BYTES < packed.total_bytes < 6 * CHUNK_BYTES
        yield packed
        gc.collect()


class Slabs:
    """Slabs in no order, each with another one's worth of room behind it that nothing may touch."""

    def __init__(self, packed: PackedWeights, slab_bytes: Bytes = SLAB, device: str = "cpu") -> None:
        count = -(-packed.total_bytes // slab_bytes)
        self.total, self.slab_bytes = packed.total_bytes, slab_bytes
        self.order = [int(i) for i in np.random.default_rng(0).permutation(count)]
        self.memory = torch.zeros((count, 2, slab_bytes), dtype=torch.uint8, device=device)

    @property
    def places(self) -> Places:
        base = self.memory.data_ptr()
        return Places(tuple(Address(base + 2 * self.slab_bytes * i) for i in self.order), self.slab_bytes)

    def content(self) -> np.ndarray:
        host = self.memory.cpu()
        assert not host[:, 1].any(), "written past a slab"
        flat = host[self.order, 0].reshape(-1)
        assert not flat[self.total :].any(), "written past the end"
        return flat[: self.total].numpy()


def carry(transfer: Transfer, copier: Copier | None = None) -> Transfer:
    """Until it has ended."""
    traffic = Traffic(copier or HostCopier())
    traffic.add(transfer)
    while traffic.step():
        pass
    assert transfer.has_ended.is_set()
    return transfer


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
    transfer = Transfer(packed, slabs.places, Registered(Address(elsewhere.data_ptr()), size))
    carry(transfer)
    assert transfer.error is None and (slabs.content() == packed.data).all()
    num_registered = 11 if registered is None else registered // SLAB
    assert seen == [True] * num_registered + [False] * (11 - num_registered)


def test_too_few_slabs_are_a_bug(packed: PackedWeights) -> None:
    places = Slabs(packed).places
    with pytest.raises(AssertionError, match="too few"):
        Transfer(packed, Places(places.slabs[:-1], SLAB))


# --- run by hand on a machine with an NVIDIA GPU ---------------------------------------------------


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("slab_bytes", [SLAB, 16 * SLAB])
def test_a_gpu_receives_and_checks_the_same_bytes(
    packed: PackedWeights, gpu: torch.device, slab_bytes: int
) -> None:
    slabs = Slabs(packed, Bytes(slab_bytes), "cuda")
    for _ in range(3):  # the pinned ring is used again
        slabs.memory.zero_()
        torch.cuda.synchronize()
        transfer = carry(Transfer(packed, slabs.places), CudaCopier(gpu, SLAB))
        assert transfer.error is None
        assert (slabs.content() == packed.data).all()


@pytest.mark.gpu
def test_a_gpu_receives_registered_bytes(packed: PackedWeights, gpu: torch.device) -> None:
    from prism.memory.cuda import CudaDriver

    driver = CudaDriver(0)
    size = Bytes(-(-packed.total_bytes // MiB) * MiB)
    base = memfd.reserve_addresses(size)
    fd = memfd.create_memfd("prism-test")
    memfd.allocate(fd, 0, size)
    memfd.map_file(base, size, fd, 0)
    tensor_at(base, (packed.total_bytes,), torch.uint8).copy_(torch.from_numpy(packed.data.copy()))
    driver.register_host(base, SLAB)  # in two pieces, as in production
    driver.register_host(Address(base + SLAB), Bytes(size - SLAB))
    slabs = Slabs(packed, SLAB, "cuda")
    transfer = carry(Transfer(packed, slabs.places, Registered(base, packed.total_bytes)), CudaCopier(gpu))
    assert transfer.error is None and (slabs.content() == packed.data).all()
    driver.unregister_host(Address(base + SLAB))
    driver.unregister_host(base)
    memfd.unreserve_addresses(base, size)
    driver.close()


@pytest.mark.gpu
def test_a_gpu_notices_damage(packed: PackedWeights, gpu: torch.device, tmp_path: Path) -> None:
    slabs = Slabs(packed, SLAB, "cuda")
    with pack_here(dummy_source(tmp_path, vocab_size=6000, hidden_size=512, intermediate_size=1024)) as own:
        own._file = own._file.copy()  # type: ignore[union-attr]
        own.checksums[2] += np.uint64(1)
        transfer = carry(Transfer(own, slabs.places), CudaCopier(gpu))
        assert isinstance(transfer.error, CheckpointError) and "1 of 6 chunks" in str(transfer.error)


@pytest.mark.gpu
def test_the_checksums_buffers_do_not_grow(packed: PackedWeights, gpu: torch.device) -> None:
    """Torch's allocator was asked for a buffer as large as each piece on its way."""
    slabs = Slabs(packed, SLAB, "cuda")
    copier = CudaCopier(gpu, SLAB)
    carry(Transfer(packed, slabs.places), copier)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    carry(Transfer(packed, slabs.places), copier)
    assert torch.cuda.max_memory_allocated() - before < MiB
