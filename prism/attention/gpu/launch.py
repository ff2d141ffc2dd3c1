"""How kernels are launched: what Triton has compiled is kept, so that a launch does not search for it again.

Triton binds and sorts all arguments of each launch in Python before it finds the kernel that it has compiled
for their like, which takes longer than many a kernel runs. Here a short key finds it (`launch`).

It also asks the driver about each tensor's address. Memory of a model that is not on the device has none, but
graphs of such a model are captured all the same, for when it comes back. So addresses are passed as numbers.

Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it by itself. At
batch 1 a layer is seven kernels of some microseconds each, so their starts and ends count. Every kernel of
this package waits before it reads or writes anything but weights, in all its programs, so that whoever comes
behind it may rely on everything before it.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor

HOPPER = (9, 0)
"""The first capability that has it, fast products of fp8 with a scale for each row and channel, and a tensor
memory accelerator."""

Grid = tuple[int, int, int]

_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
"""By kernel, kinds of arguments, constants and options: what Triton compiled, and the constants in order."""


def launch(kernel: Any, grid: Grid, *args: Tensor | TensorDescriptor | float | None, **named: Any) -> None:
    """`kernel[grid](*args, **named)` on the current stream of this process's device.

    `named` are the constants and options like `num_warps`. Others than these come as `args`, all of them.
    Tensors are on the device, at addresses that are mapped when the kernel runs: nobody looks.
    """
    key = (kernel, *map(_kind, args), *named.items())
    if key not in _compiled:
        compiled = kernel.warmup(*args, grid=grid, **named)
        _compiled[key] = compiled, tuple(named[name] for name in kernel.arg_names if name in named)
    compiled, constants = _compiled[key]
    if compiled is None:  # it is interpreted
        kernel[grid](*args, **named)
        return
    compiled[grid](*(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args), *constants)


def _kind(value: Any) -> Any:
    """What Triton compiles another kernel for: types, aligned addresses, and integers that are special."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if hasattr(value, "block_shape"):  # a `TensorDescriptor`, whose module is there with Triton only
        return value.base.dtype, tuple(value.block_shape)
    if type(value) is int:
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31, value < 1 << 63
    return type(value)


@cache
def is_hopper() -> bool:
    """Whether this process's device is one, or newer."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER


@cache
def overlap(rows: int) -> dict[str, Any]:
    """Launch options of a kernel whose `PDL` parameter says whether it is launched so.

    Only steps of one row gain; beside cuBLAS's kernels, which signal nothing, larger ones lost 1 %.
    """
    if rows == 1 and is_hopper():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
