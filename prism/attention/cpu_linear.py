"""Matrix products of a few bf16 rows on a CPU, in the form that this CPU runs fastest.

One and the same product takes 1,205 or 2,349 us for 8 rows of a 32,000 x 768 head depending on how it is
written (a Xeon with AMX; on an EPYC the order is the other way round): the forms are timed, once a process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS = 16
"""With more rows the forms are alike."""

Form = Callable[[Tensor, Tensor], Tensor]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """The form that torch gives a linear layer."""
    return F.linear(x, weight)


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """The transposed product, whose long side comes first."""
    return torch.mm(weight, x.t()).t().contiguous()


def vector(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix-vector product, for one row."""
    return torch.mv(weight, x[0]).unsqueeze(0)


class CpuLinear:
    """`x [rows, in]` times `weight [out, in]` transposed. Until `tune` has run, everything is `plain`."""

    def __init__(self) -> None:
        self._one: Form = plain
        self._few: Form = plain
        self._is_tuned = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """fp32 is always `plain`: its results must not depend on what was timed."""
        rows = x.shape[0]
        if rows > MAX_ROWS or x.dtype is not torch.bfloat16:
            return F.linear(x, weight, bias)
        out = (self._one if rows == 1 else self._few)(x, weight)
        return out if bias is None else out.add_(bias)

    def tune(self) -> None:
        """Times the forms, about 0.1 s the first time. For any thread."""
        if not self._is_tuned:
            self._one = fastest((plain, vector), 1)
            self._few = fastest((plain, weight_first), MAX_ROWS // 2)
            self._is_tuned = True


@torch.inference_mode()
def fastest(forms: tuple[Form, ...], rows: int) -> Form:
    """The form with the least time, seen over matrices that no cache holds all of (50 MB)."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4096, 768, generator=generator).bfloat16() for _ in range(8)]
    x = torch.randn(rows, 768, generator=generator).bfloat16()

    def seconds(form: Form) -> float:
        times = []
        for weight, _ in zip(cycle(weights), range(24), strict=False):
            begin = time.perf_counter()
            form(x, weight)
            times.append(time.perf_counter() - begin)
        return sorted(times)[len(times) // 4]

    return min(forms, key=seconds)
