"""Measures what a device can do, in a moment: the start of all costs for which there is no profile.

Work is timed many times in a row behind one wait, so that what a GPU's host needs to launch it and to hear of
its end, some 20 us, counts once: 134 MB are read in 32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

import torch
from torch import Tensor

from prism.costs import DeviceRates
from prism.types import Bytes, MiB, Seconds

RUNS = 4
"""The best counts: others may use the machine."""
IN_A_ROW = 8
"""On a GPU, behind one wait."""
TINY_OPERATIONS = 12
"""Of a layer, about."""
LAYERS = 32
"""Whose launches are measured together on a GPU."""
COPIED = Bytes(256 * MiB)
"""On a GPU, from one place to another: each five times its cache, so that nothing is read from there."""
LINKED = Bytes(64 * MiB)


@torch.inference_mode()
def measure_rates(device: torch.device) -> DeviceRates:
    """About 0.1 s on a CPU. On a GPU it takes some hundred MiB of torch's own memory, and gives them back."""
    if device.type != "cuda":
        return DeviceRates(_flops(device, 1024, 256), _bandwidth_of_products(), _link(device), _launch())
    with torch.cuda.device(device), _memory_returned():
        return DeviceRates(
            _flops(device, 8192, 4096), _bandwidth_of_copies(device), _link(device), _launch_of_graph(device)
        )


def best_seconds(
    work: Callable[[], object],
    wait: Callable[[], object],
    times: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Of one of so many calls in a row with one wait behind them; the least of some runs but the first."""
    seconds = []
    for _ in range(RUNS + 1):
        begin = clock()
        for _ in range(times):
            work()
        wait()
        seconds.append((clock() - begin) / times)
    return min(seconds[1:])


def _best(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        return best_seconds(work, lambda: None, 1)
    return best_seconds(work, lambda: torch.cuda.synchronize(device), IN_A_ROW)


@contextmanager
def _memory_returned() -> Iterator[None]:
    try:
        yield
    finally:
        torch.cuda.empty_cache()


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _flops(device: torch.device, size: int, rows: int) -> float:
    weight, x = _random((size, size), device), _random((rows, size), device)
    return 2.0 * rows * size * size / _best(lambda: x @ weight.t(), device)


def _bandwidth_of_products() -> float:
    """Of one row, each with another matrix."""
    weights = torch.full((16, 1024, 1024), 0.5, dtype=torch.bfloat16)
    row = torch.full((1, 1024), 0.5, dtype=torch.bfloat16)
    following = cycle(weights)
    return weights[0].nbytes / _best(lambda: row @ next(following).t(), weights.device)


def _bandwidth_of_copies(device: torch.device) -> float:
    """Read and written: decode steps come near. cuBLAS's products of one row read at 60-90 % of it."""
    places = torch.zeros((2, COPIED), device=device, dtype=torch.uint8)
    ways = cycle(((places[0], places[1]), (places[1], places[0])))

    def copy() -> None:
        source, target = next(ways)
        target.copy_(source)

    return 2 * COPIED / _best(copy, device)


def _link(device: torch.device) -> float:
    source = torch.ones(LINKED, dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(LINKED, dtype=torch.uint8, device=device)
    return LINKED / _best(lambda: target.copy_(source, non_blocking=True), device)


def _launch() -> Seconds:
    tiny = torch.zeros((64, 64), dtype=torch.bfloat16)
    return Seconds(_best(lambda: [tiny.add_(1.0) for _ in range(TINY_OPERATIONS)], tiny.device))


def _launch_of_graph(device: torch.device) -> Seconds:
    """A step is a graph mostly: its kernels wait for each other, and not for the host."""
    tiny = torch.zeros((64, 64), device=device, dtype=torch.bfloat16)
    tiny.add_(1.0)  # its kernel is loaded now, not while it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for _ in range(LAYERS * TINY_OPERATIONS):
            tiny.add_(1.0)
    return Seconds(_best(graph.replay, device) / LAYERS)
