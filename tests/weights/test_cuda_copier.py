"""Bytes arrive whole on a GPU, and never unnoticed otherwise. Run by hand on a machine with one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from prism.errors import CheckpointError
from prism.memory import memfd
from prism.memory.tensors import tensor_at
from prism.types import Address, Bytes, MiB
from prism.weights.client import PackedWeights, pack_here
from prism.weights.copiers import Copier
from prism.weights.registrations import Registered
from prism.weights.transfers import Transfer
from tests.weights.support import SLAB, Slabs, carry, dummy_source


@pytest.fixture
def gpu() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def new_copier(gpu: torch.device) -> Callable[..., Copier]:
    from prism.weights.cuda_copier import CudaCopier

    return partial(CudaCopier, gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("slab_bytes", [SLAB, 16 * SLAB])
@pytest.mark.parametrize("chunk_bytes", [SLAB // 32, SLAB])
def test_a_gpu_receives_and_checks_the_same_bytes(
    packed: PackedWeights, new_copier: Callable[..., Copier], slab_bytes: int, chunk_bytes: int
) -> None:
    slabs = Slabs(packed, Bytes(slab_bytes), "cuda")
    for _ in range(3):  # the pinned ring is used again
        slabs.memory.zero_()
        torch.cuda.synchronize()
        transfer = carry(Transfer(packed, slabs.places), new_copier(Bytes(chunk_bytes)))
        assert transfer.error is None
        assert (slabs.content() == packed.data).all()


@pytest.mark.gpu
def test_a_gpu_receives_registered_bytes(packed: PackedWeights, new_copier: Callable[..., Copier]) -> None:
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
    transfer = carry(Transfer(packed, slabs.places, Registered(base, packed.total_bytes, None)), new_copier())
    assert transfer.error is None and (slabs.content() == packed.data).all()
    driver.unregister_host(Address(base + SLAB))
    driver.unregister_host(base)
    memfd.unreserve_addresses(base, size)
    driver.close()


@pytest.mark.gpu
def test_a_gpu_notices_damage(
    packed: PackedWeights, new_copier: Callable[..., Copier], tmp_path: Path
) -> None:
    slabs = Slabs(packed, SLAB, "cuda")
    with pack_here(dummy_source(tmp_path, vocab_size=6000, hidden_size=512, intermediate_size=1024)) as own:
        own._file = own._file.copy()  # type: ignore[union-attr]
        own.checksums[2] += np.uint64(1)
        transfer = carry(Transfer(own, slabs.places), new_copier())
        assert isinstance(transfer.error, CheckpointError) and "1 of 6 chunks" in str(transfer.error)


@pytest.mark.gpu
def test_the_checksums_buffers_do_not_grow(packed: PackedWeights, new_copier: Callable[..., Copier]) -> None:
    """Torch's allocator was asked for a buffer as large as each piece on its way."""
    slabs = Slabs(packed, SLAB, "cuda")
    copier = new_copier(SLAB)
    carry(Transfer(packed, slabs.places), copier)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    carry(Transfer(packed, slabs.places), copier)
    assert torch.cuda.max_memory_allocated() - before < MiB
