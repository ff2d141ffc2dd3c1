"""Calls of the CUDA driver that loads and steps make most, without giving up the interpreter.

They take microseconds. Torch and the bindings give it up at each of them, and beside a loop that is busy,
whoever does so gets it back after half a millisecond at worst: a piece of 16 MiB with a dozen such calls
takes longer than its 0.3 ms on the link. And around each call torch looks for streams and makes tensors, so
that launching a step took ten times as long as the driver needs. None of these waits for the device, but for
`Mark.wait` and `DriverGraph`'s making, which give it up.
"""

from __future__ import annotations

import ctypes
from typing import Self

from prism.errors import DriverError
from prism.memory.driver import Handle
from prism.types import Address, Bytes

_WORD = ctypes.c_uint64
_SIZE = ctypes.c_size_t

_NOT_READY = 600
_RELAXED = 2
"""A capture that leaves its thread, and others, all calls."""
_BLOCKING_WITHOUT_TIME = 0x1 | 0x2


class CudaCalls:
    """For threads in which the device's context is current, as it is where torch was used."""

    def __init__(self) -> None:
        self._keeping = ctypes.PyDLL("libcuda.so.1")
        self._giving_up = ctypes.CDLL("libcuda.so.1")
        self._copy = _prepared(self._keeping.cuMemcpyHtoDAsync_v2, _WORD, _WORD, _SIZE, _WORD)
        self._copy_back = _prepared(self._keeping.cuMemcpyDtoHAsync_v2, _WORD, _WORD, _SIZE, _WORD)
        self._map = _prepared(self._keeping.cuMemMap, *[_WORD] * 5)
        self._wait_for = _prepared(self._keeping.cuStreamWaitEvent, _WORD, _WORD, ctypes.c_uint)
        self._launch = _prepared(self._keeping.cuGraphLaunch, _WORD, _WORD)

    def copy(self, target: Address, source: Address, size: Bytes, stream: int) -> None:
        """Queue a copy from pinned or registered host memory. Raises `DriverError`."""
        _check("cuMemcpyHtoDAsync", self._copy(target, source, size, stream))

    def copy_back(self, target: Address, source: Address, size: Bytes, stream: int) -> None:
        """Queue a copy to pinned host memory. Raises `DriverError`."""
        _check("cuMemcpyDtoHAsync", self._copy_back(target, source, size, stream))

    def map(self, address: Address, size: Bytes, handle: Handle) -> None:
        """Put the handle there; nothing may touch it yet. Raises `DriverError`."""
        _check("cuMemMap", self._map(address, size, 0, handle, 0))

    def mark(self) -> Mark:
        """A place in a stream, none yet."""
        return Mark(self._keeping, self._giving_up)

    def wait_for(self, stream: int, mark: Mark) -> None:
        """What is queued on the stream from now on runs behind the mark. Raises `DriverError`."""
        _check("cuStreamWaitEvent", self._wait_for(stream, mark.event, 0))

    def launch(self, graph: DriverGraph, stream: int) -> None:
        """Queue a graph. Raises `DriverError`."""
        _check("cuGraphLaunch", self._launch(graph.executable, stream))

    def capture(self, stream: int) -> Capture:
        """Of what is queued on the stream within its block."""
        return Capture(self._keeping, self._giving_up, stream)

    def graph(self, captured: int, stream: int) -> DriverGraph:
        """What was captured, brought to the device by way of the stream, for which this waits.

        Takes milliseconds in which other threads go on. Raises `DriverError`.
        """
        return DriverGraph(self._keeping, self._giving_up, captured, stream)


class Mark:
    """An event; used again and again, and destroyed with the object."""

    def __init__(self, keeping: ctypes.PyDLL, giving_up: ctypes.CDLL) -> None:
        event = ctypes.c_void_p()
        self.event = 0
        self._keeping = keeping
        self._giving_up = giving_up
        _check("cuEventCreate", keeping.cuEventCreate(ctypes.byref(event), _BLOCKING_WITHOUT_TIME))
        self.event = event.value or 0

    def set(self, stream: int) -> None:
        """Behind what is queued on the stream by now. Raises `DriverError`."""
        _check("cuEventRecord", self._keeping.cuEventRecord(_WORD(self.event), _WORD(stream)))

    def has_passed(self) -> bool:
        """The device has passed it. Raises `DriverError` if what stands before it has failed."""
        code: int = self._keeping.cuEventQuery(_WORD(self.event))
        if code == _NOT_READY:
            return False
        _check("cuEventQuery", code)
        return True

    def wait(self) -> None:
        """Until the device has passed it. Raises `DriverError` if what stands before it has failed."""
        if not self.has_passed():
            _check("cuEventSynchronize", self._giving_up.cuEventSynchronize(_WORD(self.event)))

    def __del__(self) -> None:
        """The driver keeps what is still on its way."""
        if self.event:
            self._keeping.cuEventDestroy_v2(_WORD(self.event))


class Capture:
    """What is queued on a stream within its block becomes a graph instead of being run.

    Threads may use other streams meanwhile as if there were none. Entering and leaving raise `DriverError`.
    """

    def __init__(self, keeping: ctypes.PyDLL, giving_up: ctypes.CDLL, stream: int) -> None:
        self._captured = 0
        self._keeping = keeping
        self._giving_up = giving_up
        self._stream = _WORD(stream)

    def __enter__(self) -> Self:
        _check("cuStreamBeginCapture", self._keeping.cuStreamBeginCapture_v2(self._stream, _RELAXED))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        captured = ctypes.c_void_p()
        code = self._keeping.cuStreamEndCapture(self._stream, ctypes.byref(captured))
        self._captured = captured.value or 0
        if kind is None:
            _check("cuStreamEndCapture", code)

    def ready(self) -> DriverGraph:
        """See `CudaCalls.graph`; by way of the same stream. Each is a graph of its own."""
        return DriverGraph(self._keeping, self._giving_up, self._captured, self._stream.value)

    def __del__(self) -> None:
        """What was made ready stays."""
        if self._captured:
            self._keeping.cuGraphDestroy(_WORD(self._captured))


class DriverGraph:
    """A graph that can be launched; destroyed with the object."""

    def __init__(self, keeping: ctypes.PyDLL, giving_up: ctypes.CDLL, captured: int, stream: int) -> None:
        """See `CudaCalls.graph`."""
        self.executable = 0
        self._keeping = keeping
        made = ctypes.c_void_p()
        no_flags = ctypes.c_ulonglong(0)
        code = giving_up.cuGraphInstantiateWithFlags(ctypes.byref(made), _WORD(captured), no_flags)
        _check("cuGraphInstantiate", code)
        self.executable = made.value or 0
        _check("cuGraphUpload", giving_up.cuGraphUpload(made, _WORD(stream)))
        _check("cuStreamSynchronize", giving_up.cuStreamSynchronize(_WORD(stream)))

    def __del__(self) -> None:
        """The driver keeps what is still on its way."""
        if self.executable:
            self._keeping.cuGraphExecDestroy(_WORD(self.executable))


def _prepared(call: ctypes._NamedFuncPointer, *kinds: type) -> ctypes._NamedFuncPointer:
    """With the kinds of its arguments, which are numbers then."""
    call.argtypes = kinds
    return call


def _check(call: str, code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        ctypes.CDLL("libcuda.so.1").cuGetErrorName(code, ctypes.byref(name))
        raise DriverError(call, (name.value or b"%d" % code).decode())
