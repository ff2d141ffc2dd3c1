from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from prism.memory import memfd
from prism.memory.tensors import tensor_at, torch_dtype
from prism.types import Address, Bytes, DType, GiB, MiB

SIZE = Bytes(2 * MiB)


@pytest.fixture
def memory() -> Iterator[Address]:
    """2 MiB that can be used, in 256 GiB of addresses that cannot."""
    reserved = Bytes(256 * GiB)
    base = memfd.reserve_addresses(reserved)
    fd = memfd.create_memfd("prism-test")
    memfd.allocate(fd, 0, SIZE)
    memfd.map_file(base, SIZE, fd, 0)
    os.close(fd)
    yield base
    memfd.unreserve_addresses(base, reserved)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int32, torch.int64]
)
def test_all_number_formats_are_native(memory: Address, dtype: torch.dtype) -> None:
    tensor = tensor_at(memory, (3, 5), dtype)
    assert tensor.dtype is dtype and tensor.data_ptr() == memory and tensor.is_contiguous()
    tensor.copy_(torch.arange(15).view(3, 5))
    assert torch.equal(tensor_at(memory, (15,), dtype), torch.arange(15).to(dtype))


def test_prisms_formats_are_torchs() -> None:
    for dtype in DType:
        assert torch_dtype(dtype).itemsize == dtype.itemsize


def test_strides_may_be_anything(memory: Address) -> None:
    flat = tensor_at(memory, (64,), torch.int32)
    flat.copy_(torch.arange(64, dtype=torch.int32))
    overlapping = tensor_at(memory, (4, 3), torch.int32, (2, 1))
    assert overlapping.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    repeated = tensor_at(memory, (2, 2), torch.int32, (0, 5))
    assert repeated.tolist() == [[0, 5], [0, 5]]
    assert torch.equal(overlapping, flat.as_strided((4, 3), (2, 1)))


def test_addresses_without_memory_are_not_touched(memory: Address) -> None:
    row = 2 * MiB // 2
    pages = tensor_at(memory, (128 * 1024, row), torch.bfloat16)
    pages[0].fill_(2)
    assert pages[0, row - 1].item() == 2
    assert pages[-1].data_ptr() == memory + (128 * 1024 - 1) * 2 * MiB


def test_scalars_and_empty_tensors(memory: Address) -> None:
    assert tensor_at(memory, (), torch.float32).shape == ()
    assert tensor_at(memory, (4, 0, 2), torch.float32).numel() == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "strides", "device", "problem"),
    [
        ((-1,), torch.uint8, None, "cpu", "negative"),
        ((1, 2), torch.uint8, (1,), "cpu", "2 sizes with 1 strides"),
        ((1,), torch.complex64, None, "cpu", "no tensors of"),
        ((1,), torch.uint8, None, "meta", "no tensors of"),
    ],
)
def test_misuse_is_an_assertion(
    memory: Address, shape: tuple[int], dtype: torch.dtype, strides: tuple[int], device: str, problem: str
) -> None:
    with pytest.raises(AssertionError, match=problem):
        tensor_at(memory, shape, dtype, strides, torch.device(device))


def test_nothing_leaks(memory: Address) -> None:
    def resident_pages() -> int:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1])

    for _ in range(2000):
        tensor_at(memory, (64, 64, 2), torch.bfloat16)
    gc.collect()
    before = resident_pages()
    for _ in range(50_000):  # a record is more than 100 bytes: a leak would be 1,200 pages
        tensor_at(memory, (64, 64, 2), torch.bfloat16)
    assert resident_pages() - before < 300


def test_tensors_may_outlive_everything_else() -> None:
    """The deleter of a tensor that dies with the interpreter must not be Python code."""
    script = """
import ctypes, torch
from prism.memory.tensors import tensor_at
buffer = ctypes.create_string_buffer(64)
class Keeper:
    pass
keeper = Keeper()
keeper.me, keeper.tensor = keeper, tensor_at(ctypes.addressof(buffer), (64,), torch.uint8)
torch.kept_for_ever = keeper.tensor.view(8, 8)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
