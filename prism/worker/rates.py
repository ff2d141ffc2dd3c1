"""Measures what a device can do, in a moment: the start of all costs for which there is no profile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from prism.costs import DeviceRates
from prism.types import MiB, Seconds

RUNS = 4
"""The best counts: others may use the machine."""
TINY_OPERATIONS = 12
"""Of a layer, about."""


@torch.inference_mode()
def measure_rates(device: torch.device) -> DeviceRates:
    """About 0.1 s on a CPU, less on a GPU; takes a few hundred MiB of torch's own memory meanwhile."""
    is_gpu = device.type == "cuda"
    size, rows = (8192, 4096) if is_gpu else (1024, 256)
    weight = _random((size, size), device)
    x = _random((rows, size), device)
    row = x[:1].contiguous()
    small = _random((64, 64), device)
    seconds = _best(lambda: x @ weight.t(), device)
    read = _best(lambda: row @ weight.t(), device)
    launch = _best(lambda: [small.add_(1.0) for _ in range(TINY_OPERATIONS)], device)
    return DeviceRates(
        flops=2.0 * rows * size * size / seconds,
        bandwidth=weight.numel() * weight.element_size() / read,
        link=_link(device),
        launch=Seconds(launch / (8 if is_gpu else 1)),  # graphs start kernels in about an eighth of the time
    )


def _random(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of some runs, the first left out."""
    times = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _link(device: torch.device) -> float:
    size = 64 * MiB
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    if device.type == "cuda":
        source = source.pin_memory()
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / _best(lambda: target.copy_(source, non_blocking=True), device)
