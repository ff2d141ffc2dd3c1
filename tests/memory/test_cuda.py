"""Run by hand on a machine with an NVIDIA GPU: `pytest -m gpu tests/memory`."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prism.errors import DriverError
from prism.memory import memfd
from prism.memory.arena import Arena
from prism.memory.driver import Driver
from prism.memory.pool import SlabPool
from prism.memory.slabs import WeightsOwner
from prism.memory.tensors import tensor_at
from prism.types import Address, Bytes, GiB, MiB, ModelId

pytestmark = pytest.mark.gpu

SLAB = Bytes(32 * MiB)
OWNER = WeightsOwner(ModelId("a"))
GPU = torch.device("cuda", 0)


@pytest.fixture
def driver() -> Iterator[Driver]:
    from prism.memory.cuda import CudaDriver

    torch.zeros(1, device=GPU)
    driver = CudaDriver(0)
    yield driver
    gc.collect()
    driver.close()


def test_memory_comes_and_goes(driver: Driver) -> None:
    before = driver.memory_info()
    pool = SlabPool(driver, SLAB, num_slabs=16, max_slabs=32)
    assert before.free - driver.memory_info().free == 16 * SLAB
    pool.grow(16)
    assert pool.shrink(24) == 24
    assert before.free - driver.memory_info().free == 8 * SLAB
    pool.close()
    assert driver.memory_info().free == before.free


def test_an_arena_shows_the_windows_bytes(driver: Driver) -> None:
    pool = SlabPool(driver, SLAB, num_slabs=4)
    arena = Arena(driver, Bytes(2 * SLAB), SLAB)
    slabs = pool.take(OWNER, 4)[2:0:-1]
    window = tensor_at(pool.window, (4, SLAB // 2), torch.bfloat16, None, GPU)
    weights = tensor_at(arena.base, (2, SLAB // 2), torch.bfloat16, None, GPU)
    arena.map([pool.handle(slab) for slab in slabs])
    weights[0].fill_(3)
    weights[1].fill_(4)
    assert window[slabs[0]].eq(3).all() and window[slabs[1]].eq(4).all()
    torch.cuda.synchronize()
    arena.unmap()
    assert window[slabs[0]].eq(3).all()
    del window, weights
    arena.close()
    pool.give_back(OWNER, pool.owned(OWNER))
    pool.close()


def test_a_full_device_is_an_error_and_the_pool_goes_on(driver: Driver) -> None:
    pool = SlabPool(driver, Bytes(GiB), num_slabs=2, max_slabs=4096)
    with pytest.raises(DriverError, match="cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY"):
        pool.grow(4000)
    pool.check()
    assert pool.num_slabs == 2
    pool.close()


def test_host_memory_can_be_registered(driver: Driver) -> None:
    size = Bytes(64 * MiB)
    fd = memfd.create_memfd("prism-test")
    memfd.allocate(fd, 0, size)
    base = memfd.reserve_addresses(size)
    memfd.map_file(base, size, fd, 0)
    driver.register_host(base, size)  # type: ignore[attr-defined]
    source = tensor_at(Address(base), (size,), torch.uint8)
    source.copy_(torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, np.uint8)))
    assert torch.equal(source.to(GPU, non_blocking=True).cpu(), source)
    driver.unregister_host(base)  # type: ignore[attr-defined]
    memfd.unreserve_addresses(base, size)
