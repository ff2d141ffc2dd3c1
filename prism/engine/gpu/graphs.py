"""CUDA graphs of decode steps, one for each model, batch size and split of the contexts.

Graphs hold addresses: of the lane's buffers, the window and the model's arena, none of which ever change, so
a graph outlives the eviction of its model. Memory of intermediate results is shared by all graphs of a lane.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 1025, 32))
"""Batch sizes that have graphs; a batch is padded up to the next one."""
MAX_GRAPHS = 256
"""Of one lane; some 0.6 MiB of device memory each."""


def padded_size(batch: int, limit: int) -> int:
    """The least size that holds the batch."""
    return min(next((size for size in SIZES if size >= batch), limit), limit)


class Graphs:
    """The graphs of one lane, least recently used first."""

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self._stream = stream
        self._pool = pool
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()

    def __len__(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue `work`, which always does the same to the same addresses, on the lane's stream.

        The first time it runs as it is, which loads its kernels; the second time it is captured.
        """
        if key not in self._graphs:
            self._graphs[key] = None
            work()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._capture(work)
        self._graphs.move_to_end(key)
        self._trim()
        graph.replay()

    def forget(self, owner: Hashable) -> None:
        """Drop all graphs whose keys begin with `owner`."""
        for key in [key for key in self._graphs if isinstance(key, tuple) and key[0] == owner]:
            del self._graphs[key]

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Other threads go on using the device meanwhile; nothing is synchronised."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        return graph

    def _trim(self) -> None:
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
