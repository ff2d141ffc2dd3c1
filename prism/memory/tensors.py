"""Torch tensors over any address, through a DLPack capsule: native bf16, any strides, nothing touched.

`from_dlpack` neither asks the device about the pointer nor reads behind it, so a tensor may span
addresses that have no memory yet. The capsule's record is one malloc'd block whose deleter is C's own `free`:
nothing of Python runs when a tensor dies, whatever thread it dies in and however late.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import torch
from torch.utils.dlpack import from_dlpack

from prism.types import Address, DType

_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_CAPSULE_NAME: Final = b"dltensor"  # the capsule keeps the pointer, so the bytes must outlive it

_HOST = torch.device("cpu")
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_CODES = {
    torch.bfloat16: (_BFLOAT, 16),
    torch.float16: (_FLOAT, 16),
    torch.float32: (_FLOAT, 32),
    torch.uint8: (_UINT, 8),
    torch.int32: (_INT, 32),
    torch.int64: (_INT, 64),
    torch.float8_e4m3fn: (_UINT, 8),  # handed over as bytes: DLPack knows the format only in later versions
}
_F8 = torch.float8_e4m3fn
_TORCH_DTYPES = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8: torch.float8_e4m3fn,
}


class _ManagedTensor(ctypes.Structure):
    """DLPack's `DLManagedTensor` (version 0): a `DLTensor`, a context and a deleter."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def torch_dtype(dtype: DType) -> torch.dtype:
    """The same number format as torch names it."""
    return _TORCH_DTYPES[dtype]


def tensor_at(
    address: Address,
    shape: Sequence[int],
    dtype: torch.dtype,
    strides: Sequence[int] | None = None,
    device: torch.device = _HOST,
) -> torch.Tensor:
    """A tensor over memory that somebody else keeps alive.

    `strides` count elements, as torch's do; None means contiguous. Whoever unmaps the memory must know
    that the tensor is not used any more: `repr`, `clone` or `zero_` touch all of it.
    """
    strides = _contiguous(shape) if strides is None else strides
    assert len(shape) == len(strides), f"{len(shape)} sizes with {len(strides)} strides"
    assert all(length >= 0 for length in shape), f"negative size in {list(shape)}"
    assert device.type in _DEVICE_TYPES and dtype in _CODES, f"no tensors of {dtype} on {device}"
    record = _new_record(address, shape, strides, dtype, device)
    tensor = from_dlpack(_new_capsule(record, _CAPSULE_NAME, None))
    return tensor if dtype is not _F8 else tensor.view(_F8)


def _new_record(
    address: Address, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device
) -> int:
    """The malloc'd DLManagedTensor, with shape and strides behind it."""
    ndim, size = len(shape), ctypes.sizeof(_ManagedTensor)
    block: int | None = _libc.malloc(size + 16 * ndim)
    if block is None:
        raise MemoryError
    (ctypes.c_int64 * (2 * ndim)).from_address(block + size)[:] = [*shape, *strides]
    record = _ManagedTensor.from_address(block)
    record.data, record.byte_offset, record.context = address, 0, None
    record.device_type = _DEVICE_TYPES[device.type]
    record.device_id = device.index or 0
    record.ndim, record.lanes = ndim, 1
    record.code, record.bits = _CODES[dtype]
    record.shape, record.strides = block + size, block + size + 8 * ndim
    record.deleter = ctypes.cast(_libc.free, ctypes.c_void_p).value
    return block


def _contiguous(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]
