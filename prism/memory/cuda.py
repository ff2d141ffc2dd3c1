"""Memory of one NVIDIA GPU through the CUDA driver API: one thin method per call.

Imported by the worker of a CUDA device only, since it needs the cuda-bindings package. Handles are created so
that their file descriptors can be exported to other processes. Calls release the GIL, unless they say more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cuda.bindings import driver as cuda

from prism.errors import DriverError
from prism.memory.cuda_calls import CudaCalls
from prism.memory.driver import Handle, MemoryInfo, undone
from prism.types import Address, Bytes


class CudaDriver:
    """The device's primary context, which torch uses too. Methods may be called from any thread."""

    def __init__(self, device_index: int) -> None:
        """Raises `DriverError` when there is no such device, or no NVIDIA driver at all."""
        try:
            _call(cuda.cuInit, 0)
        except RuntimeError as error:  # the bindings did not find libcuda
            raise DriverError("cuInit", str(error)) from error
        self._calls = CudaCalls()
        self._device = _call(cuda.cuDeviceGet, device_index)
        self._context = _call(cuda.cuDevicePrimaryCtxRetain, self._device)
        self._sizes: dict[Handle, Bytes] = {}
        self._properties = _properties(device_index)
        self._access = _read_write(device_index)
        self._granularity = self._recommended_granularity()

    @property
    def granularity(self) -> Bytes:
        """2 MiB on the GPUs seen so far."""
        return self._granularity

    def reserve(self, size: Bytes) -> Address:
        """See `Driver.reserve`."""
        return Address(int(_call(cuda.cuMemAddressReserve, size, self._granularity, 0, 0)))

    def unreserve(self, address: Address, size: Bytes) -> None:
        """See `Driver.unreserve`."""
        _call(cuda.cuMemAddressFree, address, size)

    def create(self, size: Bytes) -> Handle:
        """See `Driver.create`."""
        handle = Handle(int(_call(cuda.cuMemCreate, size, self._properties, 0)))
        self._sizes[handle] = size
        return handle

    def release(self, handle: Handle) -> None:
        """See `Driver.release`."""
        _call(cuda.cuMemRelease, handle)
        del self._sizes[handle]

    def map(self, address: Address, *handles: Handle) -> None:
        """See `Driver.map`. Only access, which takes 25 to 45 us a handle, is set without the interpreter."""
        num_mapped, size = 0, Bytes(0)
        try:
            for handle in handles:
                self._calls.map(Address(address + size), self._sizes[handle], handle)
                num_mapped, size = num_mapped + 1, Bytes(size + self._sizes[handle])
            _call(cuda.cuMemSetAccess, address, size, [self._access], 1)
        except DriverError as error:
            raise undone(error, num_mapped, lambda: self.unmap(address, size)) from error

    def unmap(self, address: Address, size: Bytes) -> None:
        """See `Driver.unmap`. It does not wait: a kernel that still reads there crashes the context."""
        _call(cuda.cuMemUnmap, address, size)

    def memory_info(self) -> MemoryInfo:
        """See `Driver.memory_info`; other programs' memory is not free."""
        self._enter()
        free, total = _call(cuda.cuMemGetInfo)
        return MemoryInfo(Bytes(free), Bytes(total))

    def register_host(self, address: Address, size: Bytes, *, read_only: bool = False) -> None:
        """Pin host memory for copies at full speed: about 0.07 s/GiB, so never on the way of an activation.

        `read_only` is for memory mapped without write access; not every system supports it.
        """
        self._enter()
        flags = cuda.CU_MEMHOSTREGISTER_PORTABLE
        _call(cuda.cuMemHostRegister, address, size, flags | cuda.CU_MEMHOSTREGISTER_READ_ONLY * read_only)

    def unregister_host(self, address: Address) -> None:
        """Undo `register_host` of the range that begins at `address`."""
        self._enter()
        _call(cuda.cuMemHostUnregister, address)

    def copy_async(self, runs: Iterable[tuple[Address, Address, Bytes]], stream: int) -> None:
        """Queue copies (source, target, size) on a stream, between any memory that this device can reach."""
        self._enter()
        for source, target, size in runs:
            _call(cuda.cuMemcpyAsync, target, source, size, stream)

    def close(self) -> None:
        """See `Driver.close`."""
        assert not self._sizes, f"{len(self._sizes)} handles were not released"
        _call(cuda.cuDevicePrimaryCtxRelease, self._device)

    def _enter(self) -> None:
        """Make the context current: a thread that has not used CUDA yet has none."""
        _call(cuda.cuCtxSetCurrent, self._context)

    def _recommended_granularity(self) -> Bytes:
        flag = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return Bytes(int(_call(cuda.cuMemGetAllocationGranularity, self._properties, flag)))


def _properties(device_index: int) -> Any:
    """Device memory whose handles can be exported as file descriptors."""
    properties = cuda.CUmemAllocationProp()
    properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    properties.requestedHandleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    return properties


def _read_write(device_index: int) -> Any:
    access = cuda.CUmemAccessDesc()
    access.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access.location.id = device_index
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _call(function: Any, *arguments: Any) -> Any:
    """What a driver call returns: None, one value or a tuple. Raises `DriverError` with CUDA's name."""
    status, *results = function(*arguments)
    if status != cuda.CUresult.CUDA_SUCCESS:
        raise DriverError(function.__name__, status.name)
    return results[0] if len(results) == 1 else tuple(results) or None
