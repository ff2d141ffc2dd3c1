"""CUDA graphs of steps, one for each model, batch size, split of the contexts and number of prompt tokens.

Decodes always have one. Steps with few prompt tokens, too: their kernels take less time than their launches.
Graphs hold addresses: of the lane's buffers, the window and the model's arena, none of which ever change, so
a graph outlives the eviction of its model. Memory of intermediate results is shared by all graphs of a lane.
They are captured beside the steps (captures.py).
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prism.engine.pieces import Work
from prism.engine.runner import GraphUsage
from prism.types import Bytes, MiB

if TYPE_CHECKING:  # needs Triton, which only GPUs have
    import torch

    from prism.attention.gpu.decode import Split

SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16), *range(288, 1025, 32))
"""Batch sizes that have graphs; a batch is padded up to the next one."""
LIKELY_SIZES = (1, 8, 2, 4, 16, 32, 64)
"""Captured ahead, in this order: the first ones serve most others too."""
MOST_PADDING = 4
"""While a size has no graph, a larger one's serves up to so many times the size."""
DECODES_BESIDE = (8, 32, 128, 256, 384, 512)
"""Rows of decodes in steps with prompts; few more or less make no difference there."""
PROMPT_ROWS = (32, 64, 128, 256, 384, 512, 768, 1024, 1536, 1792, 2048)
"""Prompt tokens of steps that have graphs. None serves another number: what is padded, and with it the last
bits of results, would depend on what has been captured."""
MAX_CHUNKS = 8
"""Prompts of such a step; with more it fills the device in any case."""
LAUNCH_BOUND = 1.3e11
"""Weights of a layer times tokens up to which a step waits for its launches: 2,100 tokens of a 1B, 600 of an
8B. At the bound launching a step of a 1B takes 8 ms, kernel by kernel, as long as computing it on an H200
(`benchmarks/serving`)."""
LIKELY_PROMPTS = tuple(
    (beside, rows) for beside in (8, 32) for rows in (128, 512, 256, 32, 384, 64, 768, 1024, 1536)
)
"""Rows of decodes and prompt tokens, captured ahead after the likely sizes of decodes, in this order."""
MAX_GRAPHS = 256
BUDGET = Bytes(256 * MiB)
"""Of one lane, least recently used first out."""


class Key(NamedTuple):
    """Names a graph."""

    owner: int
    size: int
    """Rows of decodes."""
    split: Split
    prompt_rows: int = 0


class Graph(Protocol):
    """What was captured."""

    def replay(self, stream: torch.cuda.Stream) -> None:
        """Queue it on the stream."""
        ...


class Wish(NamedTuple):
    """A graph to be captured."""

    graphs: Graphs
    key: Key
    work: Callable[[], Work]


class Captures(Protocol):
    """Who captures."""

    def add(self, wish: Wish, *, is_urgent: bool) -> None:
        """Capture it some time, or at once if a step lacked it; wishes that are there already stay one."""
        ...


def padded_size(batch: int, limit: int) -> int:
    """The least size that holds the batch."""
    return min(next((size for size in SIZES if size >= batch), limit), limit)


def padded_prompts(num_rows: int, limit: int) -> int | None:
    """The least number of prompt tokens that has graphs and holds these; None beyond the limit."""
    return next((rows for rows in PROMPT_ROWS if num_rows <= rows <= limit), None)


def padded_beside(decodes: int, limit: int) -> int | None:
    """The least number of decode rows that steps with prompts have graphs for; None beyond the limit."""
    return next((rows for rows in (*DECODES_BESIDE, limit) if decodes <= rows <= limit), None)


def row_numbers(max_batch: int, max_tokens: int) -> list[int]:
    """Of the products of all steps that have graphs, on a device for so many sequences and tokens a step.

    Of other steps one in 64: kernels go by tiles of so many rows or more.
    """
    decodes = {*range(1, 8), *(size for size in SIZES if size <= max_batch), max_batch}
    beside = {rows for rows in (*DECODES_BESIDE, max_batch) if rows <= max_batch}
    prompts = {rows for rows in PROMPT_ROWS if rows <= max_tokens}
    mixed = {b + p for b in beside for p in prompts}
    drawn = {b + MAX_CHUNKS for b in beside}
    return sorted({*decodes, *mixed, *drawn, *range(64, max_tokens + 1, 64), max_tokens})


class Graphs:
    """The graphs of one lane, least recently used first."""

    def __init__(self, captures: Captures, budget: Bytes = BUDGET) -> None:
        self._captures = captures
        self._budget = budget
        self._graphs: OrderedDict[Key, tuple[Graph, Bytes]] = OrderedDict()
        self._by_owner: defaultdict[int, set[Key]] = defaultdict(set)
        self._failed: set[Key] = set()
        self._num_bytes = 0
        """Of those that are there."""
        self._num_taken = 0

    @property
    def usage(self) -> GraphUsage:
        """How many there are, and what the driver took for all there were."""
        return GraphUsage(len(self._graphs), Bytes(self._num_taken))

    def find(self, key: Key) -> Key | None:
        """The graph that serves a step best.

        1. The one that is meant for it.
        2. One of its size with another split: only speed depends on that.
        3. The next larger size, within reason. Not for one row alone, which has kernels of its own, nor with
           prompts.
        """
        if key in self._graphs:  # 1
            return key
        others = [other for other in self._by_owner.get(key.owner, ()) if _serves(other, key)]
        return min(others, key=lambda k: (k.size, k.split), default=None)  # 2

    def want(self, key: Key, work: Callable[[], Work], *, is_urgent: bool) -> None:
        """Have a graph captured, unless it is there or could not be captured before."""
        if key not in self._graphs and key not in self._failed:
            self._captures.add(Wish(self, key, work), is_urgent=is_urgent)

    def __contains__(self, key: Key) -> bool:
        """The graph is there."""
        return key in self._graphs

    def replay(self, key: Key, stream: torch.cuda.Stream) -> bool:
        """Queue a graph on the stream; False if it has been dropped meanwhile."""
        found = self._graphs.get(key)
        if found is None:
            return False
        self._graphs.move_to_end(key)
        found[0].replay(stream)
        return True

    def add(self, key: Key, graph: Graph, num_bytes: Bytes) -> None:
        """A graph was captured; others may have to go for it."""
        self._graphs[key] = (graph, num_bytes)
        self._by_owner[key.owner].add(key)
        self._num_bytes += num_bytes
        self._num_taken += num_bytes
        while len(self._graphs) > 1 and (len(self._graphs) > MAX_GRAPHS or self._num_bytes > self._budget):
            self._drop(next(iter(self._graphs)))

    def fail(self, key: Key) -> None:
        """It cannot be captured: such steps are launched kernel by kernel for good."""
        self._failed.add(key)

    def forget(self, owner: int) -> None:
        """Drop all graphs of a model."""
        for key in tuple(self._by_owner.get(owner, ())):
            self._drop(key)
        self._failed = {key for key in self._failed if key.owner != owner}

    def _drop(self, key: Key) -> None:
        self._num_bytes -= self._graphs.pop(key)[1]
        self._by_owner[key.owner].discard(key)


def _serves(graph: Key, step: Key) -> bool:
    """Whether a graph holds all of a step and is not much larger."""
    is_exact = step.size == 1 or step.prompt_rows > 0
    largest = step.size if is_exact else MOST_PADDING * step.size  # 3
    return step.prompt_rows == graph.prompt_rows and step.size <= graph.size <= largest
