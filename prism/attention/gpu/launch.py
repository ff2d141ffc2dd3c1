"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits for it by itself.

At batch 1 a layer is seven kernels of some microseconds each, so their starts and ends count. Every kernel of
this package waits before it reads or writes anything but weights, in all its programs, so that whoever comes
behind it may rely on everything before it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

HOPPER = (9, 0)
"""The first capability that has it, and fast products of fp8 with a scale for each row and channel."""


@cache
def has_fp8() -> bool:
    """Whether this device's matrix units take fp8 as this package uses it."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER


@cache
def overlap(rows: int) -> dict[str, Any]:
    """Launch options of a kernel whose `PDL` parameter says whether it is launched so.

    Only steps of one row gain; beside cuBLAS's kernels, which signal nothing, larger ones lost 1 %.
    """
    if rows == 1 and torch.cuda.is_available() and torch.cuda.get_device_capability() >= HOPPER:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
