"""The calls of the CUDA driver that a load makes most, without giving up the interpreter.

They take microseconds. Torch and the bindings give it up at each of them, and beside a loop that is busy,
whoever does so gets it back after half a millisecond at worst: a piece of 16 MiB with a dozen such calls
takes longer than its 0.3 ms on the link. None of these waits for the device, but for `Mark.wait`, which
gives it up.
"""

from __future__ import annotations

import ctypes

from prism.errors import DriverError
from prism.memory.driver import Handle
from prism.types import Address, Bytes

_NOT_READY = 600
_BLOCKING_WITHOUT_TIME = 0x1 | 0x2


class CudaCalls:
    """For threads in which the device's context is current, as it is where torch was used."""

    def __init__(self) -> None:
        self._keeping = ctypes.PyDLL("libcuda.so.1")
        self._giving_up = ctypes.CDLL("libcuda.so.1")
        self._copy = self._keeping.cuMemcpyHtoDAsync_v2
        self._copy.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        self._map = self._keeping.cuMemMap
        self._map.argtypes = [ctypes.c_uint64] * 5
        self._wait_for = self._keeping.cuStreamWaitEvent
        self._wait_for.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]

    def copy(self, target: Address, source: Address, size: Bytes, stream: int) -> None:
        """Queue a copy from pinned or registered host memory. Raises `DriverError`."""
        _check("cuMemcpyHtoDAsync", self._copy(target, source, size, stream))

    def map(self, address: Address, size: Bytes, handle: Handle) -> None:
        """Put the handle there; nothing may touch it yet. Raises `DriverError`."""
        _check("cuMemMap", self._map(address, size, 0, handle, 0))

    def mark(self) -> Mark:
        """A place in a stream, none yet."""
        return Mark(self._keeping, self._giving_up)

    def wait_for(self, stream: int, mark: Mark) -> None:
        """What is queued on the stream from now on runs behind the mark. Raises `DriverError`."""
        _check("cuStreamWaitEvent", self._wait_for(stream, mark.event, 0))


class Mark:
    """An event; used again and again, and destroyed with the object."""

    def __init__(self, keeping: ctypes.PyDLL, giving_up: ctypes.CDLL) -> None:
        self.event = ctypes.c_void_p()
        self._keeping = keeping
        self._giving_up = giving_up
        _check("cuEventCreate", keeping.cuEventCreate(ctypes.byref(self.event), _BLOCKING_WITHOUT_TIME))

    def set(self, stream: int) -> None:
        """Behind what is queued on the stream by now. Raises `DriverError`."""
        _check("cuEventRecord", self._keeping.cuEventRecord(self.event, ctypes.c_void_p(stream)))

    def wait(self) -> None:
        """Until the device has passed it. Raises `DriverError` if what stands before it has failed."""
        code = self._keeping.cuEventQuery(self.event)
        if code == _NOT_READY:
            code = self._giving_up.cuEventSynchronize(self.event)
        _check("cuEventSynchronize", code)

    def __del__(self) -> None:
        """The driver keeps what is still on its way."""
        if self.event:
            self._keeping.cuEventDestroy_v2(self.event)


def _check(call: str, code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        ctypes.CDLL("libcuda.so.1").cuGetErrorName(code, ctypes.byref(name))
        raise DriverError(call, (name.value or b"%d" % code).decode())
