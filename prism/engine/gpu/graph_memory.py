"""Has the driver take memory for graphs before any is captured.

It takes 2 MiB of the device at a time, within the call that makes a graph ready. That call then takes up to
5 ms, and launches of other models wait in the driver for 2.5 of them. What it has once taken it keeps: so
graphs are made ready that are as large as those of a model, and destroyed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from prism.types import Bytes, MiB

if TYPE_CHECKING:  # needs Triton, which only GPUs have
    from prism.attention.gpu.products import Products

NUM_GRAPHS = 25
"""Likely ones of a model."""
NUMBERS = range(8, 488, 8)
"""Of rows: with five products each, as many kernels as a model of 32 layers has in a graph."""
MOST_BYTES = Bytes(64 * MiB)
"""That are believed to be theirs, since others may allocate meanwhile. 25 graphs of 300 kernels took 34."""


def take_graph_memory(products: Products) -> Generator[None, None, Bytes]:
    """Graph by graph; bytes of the device that the driver has taken. Raises `DriverError`.

    One capture serves for all: beside a loop that is busy each product waits for the interpreter, 1.5 ms.
    """
    before = torch.cuda.mem_get_info(products.device)[0]
    captured, kept = products.capture(NUMBERS), []
    for _ in range(NUM_GRAPHS):
        kept.append(captured.ready())
        yield
    kept.clear()
    return Bytes(max(0, min(before - torch.cuda.mem_get_info(products.device)[0], MOST_BYTES)))
