"""What was compiled is found again, for arguments of the same kinds only. The kernel is a stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism.attention.gpu import launch as module
from prism.attention.gpu.launch import launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self._kernel.launches.append((grid, args))


class Kernel:
    """As Triton's: it compiles without a launch. Nothing comes of it if it is interpreted."""

    arg_names = ("x", "count", "WIDTH", "BLOCK")

    def __init__(self) -> None:
        self.num_compiled = 0
        self.is_interpreted = False
        self.launches: list[Any] = []

    def warmup(self, *args: Any, grid: Any, **named: int) -> Compiled | None:
        self.num_compiled += 1
        return None if self.is_interpreted else Compiled(self)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self.launches.append((grid, (*args, *named.values())))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def test_the_second_launch_finds_what_the_first_compiled(kernel: Kernel) -> None:
    """Constants come in the kernel's order, whatever the caller's, and tensors as numbers: Triton would ask
    the driver about their memory, and that of a model which is away is not mapped.
    """
    x = torch.zeros(64)
    for rows in (3, 5):
        launch(kernel, (rows, 1, 1), x, 7, BLOCK=2, WIDTH=9, num_warps=4)
    assert kernel.num_compiled == 1
    assert kernel.launches == [((rows, 1, 1), (x.data_ptr(), 7, 9, 2)) for rows in (3, 5)]


@pytest.mark.parametrize(
    ("other", "count", "width", "warps"),
    [
        (torch.zeros(64, dtype=torch.bfloat16), 7, 9, 4),
        (torch.zeros(64)[1:], 7, 9, 4),  # not aligned
        (None, 7, 9, 4),
        (torch.zeros(64), 1, 9, 4),
        (torch.zeros(64), 32, 9, 4),
        (torch.zeros(64), 1 << 31 | 1, 9, 4),
        (torch.zeros(64), 7.0, 9, 4),
        (torch.zeros(64), 7, 10, 4),
        (torch.zeros(64), 7, 9, 8),
    ],
)
def test_other_kinds_of_arguments_are_compiled_for_themselves(
    kernel: Kernel, other: Any, count: float, width: int, warps: int
) -> None:
    launch(kernel, (1, 1, 1), torch.zeros(64), 7, WIDTH=9, BLOCK=2, num_warps=4)
    launch(kernel, (1, 1, 1), other, count, WIDTH=width, BLOCK=2, num_warps=warps)
    assert kernel.num_compiled == 2


def test_descriptors_are_told_apart_by_tiles_and_numbers_not_by_memory(kernel: Kernel) -> None:
    """Triton makes them anew of each launch's memory."""
    for size, tile, dtype in (
        (8, 4, torch.half),
        (16, 4, torch.half),
        (16, 2, torch.half),
        (16, 2, torch.float),
    ):
        rows = SimpleNamespace(base=torch.zeros(size, 4, dtype=dtype), block_shape=[tile, 4])
        launch(kernel, (1, 1, 1), rows, 7, WIDTH=9, BLOCK=2)
        assert kernel.launches[-1][1][0] is rows
    assert kernel.num_compiled == 3


def test_what_is_interpreted_is_called_as_it_is(kernel: Kernel) -> None:
    kernel.is_interpreted = True
    x = torch.zeros(64)
    for rows in (3, 5):
        launch(kernel, (rows, 1, 1), x, 3, WIDTH=9, BLOCK=2)
    assert kernel.launches == [((rows, 1, 1), (x, 3, 9, 2)) for rows in (3, 5)]
