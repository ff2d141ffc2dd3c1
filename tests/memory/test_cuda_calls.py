"""The driver's calls as steps make them."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from prism.errors import DriverError
from prism.memory.cuda_calls import CudaCalls
from prism.types import Address, Bytes

pytestmark = pytest.mark.gpu


def test_a_graph_runs_between_copies() -> None:
    """Words go to the device, a graph doubles them, and they come back, in the stream's order."""
    calls, stream = CudaCalls(), torch.cuda.Stream()
    device = torch.zeros(1 << 20, dtype=torch.int32, device="cuda")
    there, back = (torch.zeros(1 << 20, dtype=torch.int32, pin_memory=True) for _ in range(2))
    captured = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.stream(stream):
        captured.capture_begin(capture_error_mode="relaxed")
        device.mul_(2)
        captured.capture_end()
    graph = calls.graph(captured.raw_cuda_graph(), stream.cuda_stream)
    size = Bytes(4 << 20)
    marks = []
    for number in range(3):
        there[:] = torch.arange(1 << 20) + number
        calls.copy(Address(device.data_ptr()), Address(there.data_ptr()), size, stream.cuda_stream)
        calls.launch(graph, stream.cuda_stream)
        calls.copy_back(Address(back.data_ptr()), Address(device.data_ptr()), size, stream.cuda_stream)
        mark = calls.mark()
        mark.set(stream.cuda_stream)
        mark.wait()
        marks.append(mark)
        assert mark.has_passed() and torch.equal(back, 2 * there)


def test_what_is_captured_runs_when_it_is_launched() -> None:
    """Two graphs, again and again, also once the capture is gone; an error leaves the stream as it was."""
    calls, stream = CudaCalls(), torch.cuda.Stream()
    number = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with calls.capture(stream.cuda_stream) as capture:
            number.add_(1)
        with suppress(ValueError), calls.capture(stream.cuda_stream):
            number.add_(10)
            raise ValueError
        number.add_(100)
    stream.synchronize()
    assert float(number) == 100
    graphs = [capture.ready(), capture.ready()]
    del capture
    for graph in (*graphs, graphs[1]):
        calls.launch(graph, stream.cuda_stream)
    stream.synchronize()
    assert float(number) == 103


def test_a_mark_is_passed_when_what_stands_before_it_has_run() -> None:
    calls, stream, other = CudaCalls(), torch.cuda.Stream(), torch.cuda.Stream()
    first, second = calls.mark(), calls.mark()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
    first.set(stream.cuda_stream)
    calls.wait_for(other.cuda_stream, first)
    second.set(other.cuda_stream)
    assert not first.has_passed() and not second.has_passed()
    second.wait()
    assert first.has_passed()


def test_what_the_driver_refuses_is_named() -> None:
    calls = CudaCalls()
    with pytest.raises(DriverError, match="cuMemcpyHtoDAsync failed: CUDA_ERROR"):
        calls.copy(Address(0), Address(0), Bytes(64), 0)
