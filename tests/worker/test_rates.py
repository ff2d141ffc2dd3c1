"""What a device can do, measured when it is opened."""

from __future__ import annotations

import pytest
import torch

from prism.types import GiB
from prism.worker.rates import best_seconds, measure_rates


class Queue:
    """A device whose host needs a while to launch a kernel, and to hear that all have run."""

    def __init__(self, kernel: float, launch: float = 5e-6, wake: float = 15e-6) -> None:
        self.now = 0.0
        self._kernel, self._launch, self._wake = kernel, launch, wake
        self._end = 0.0

    def start(self) -> None:
        self.now += self._launch
        self._end = max(self._end, self.now) + self._kernel

    def wait(self) -> None:
        self.now = max(self.now, self._end) + self._wake


def test_launches_and_the_wait_hide_behind_the_kernels() -> None:
    """Each product was timed with its launch and a wait: 134 MB that are read in 32 us took 52."""
    queue = Queue(32e-6)
    alone = best_seconds(queue.start, queue.wait, 1, lambda: queue.now)
    in_a_row = best_seconds(queue.start, queue.wait, 8, lambda: queue.now)
    assert alone == pytest.approx(52e-6) and in_a_row == pytest.approx((5 + 8 * 32 + 15) * 1e-6 / 8)


def test_the_best_run_counts_and_the_first_does_not() -> None:
    times = iter([0.0, 1.0, 10.0, 14.0, 20.0, 23.0, 30.0, 35.0, 40.0, 46.0])
    assert best_seconds(lambda: None, lambda: None, 1, lambda: next(times)) == 3.0


def test_a_cpu_is_measured() -> None:
    rates = measure_rates(torch.device("cpu"))
    assert rates.flops > 1e8 and rates.bandwidth > 1e8 and rates.link > 1e8 and 0 < rates.launch < 0.1


@pytest.mark.gpu
def test_a_gpu_reads_as_fast_as_it_copies_much_more() -> None:
    """2.1e12 was said of an H200 whose decode steps read at 4.2e12."""
    device = torch.device("cuda")
    rates = measure_rates(device)
    source = torch.zeros(1 * GiB, dtype=torch.uint8, device=device)  # others may have bounded torch's memory
    target = torch.empty_like(source)
    seconds = best_seconds(lambda: target.copy_(source), lambda: torch.cuda.synchronize(device), 3)
    print(f"\n{rates}, a copy of 1 GiB {2 * source.nbytes / seconds / 1e12:.2f} TB/s")
    assert rates.bandwidth == pytest.approx(2 * source.nbytes / seconds, rel=0.1)
    assert 5e-6 < rates.launch < 5e-5
