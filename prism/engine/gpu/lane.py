"""A lane of a GPU: a stream, and all memory that steps on it share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prism.attention.gpu.argmax import PARTS, draw_greedy
from prism.attention.gpu.decode import SCRATCH_BYTES
from prism.attention.gpu.kernels import GpuKernels
from prism.attention.gpu.sampling import draw_random
from prism.engine.gpu.draw_table import DrawPlaces, DrawTable
from prism.engine.gpu.flight import Event
from prism.engine.gpu.graphs import MAX_CHUNKS
from prism.engine.kv_layout import BLOCK_TOKENS
from prism.memory.cuda_calls import CudaCalls
from prism.types import Address, Bytes

RING = 4
"""Pinned buffers of a lane: at most two steps are queued, so a buffer has been copied when it returns."""
MAX_ENTRIES = 1 << 15
"""Blocks that a step enters into the tables: half a million tokens of context or more; a few ms."""


class LaneShape(NamedTuple):
    """What a lane is made for."""

    max_sequences: int
    max_blocks: int
    """Of one sequence."""
    max_batch: int
    max_vocab: int
    max_tokens: int
    """Of one step."""

    @property
    def max_rows(self) -> int:
        """Of one step's logits: in a graph, a full batch of padded decodes, and one for each prompt chunk."""
        return self.max_batch + MAX_CHUNKS

    @property
    def max_entries(self) -> int:
        """Blocks that one step may enter into the tables; those of one sequence always."""
        return max(MAX_ENTRIES, self.max_blocks)

    @property
    def staging_words(self) -> int:
        """Words of 32 bits that a step may bring along.

        Two for each entry, those that its own tokens add included; for each token, and each row that pads
        decodes, its id, place and row, and its share of prefill's work list; for each row of logits what a
        draw takes; and the gaps between all these.
        """
        entries = self.max_entries + self.max_tokens // BLOCK_TOKENS.start + self.max_rows
        return 2 * entries + 4 * (self.max_tokens + self.max_rows) + 32 * self.max_rows + 1024


class Buffers:
    """Pinned words for a step's inputs, and for its tokens."""

    def __init__(self, num_words: int, max_batch: int) -> None:
        self._pinned = torch.empty(num_words, dtype=torch.int32, pin_memory=True)
        self.address = Address(self._pinned.data_ptr())
        self.words = self._pinned.numpy()
        """The inputs, to be written."""
        self.tokens = torch.empty(max_batch, dtype=torch.int32, pin_memory=True)


class LaneBytes(NamedTuple):
    """Sizes of the parts of a lane's memory."""

    tables: int
    tokens: int
    logits: int
    staging: int
    drawn: int

    @classmethod
    def of(cls, shape: LaneShape) -> LaneBytes:
        """Each part rounded up to 256 bytes."""
        slots = shape.max_sequences + 1
        sizes = (
            slots * shape.max_blocks * 4,
            slots * 4,
            shape.max_rows * shape.max_vocab * 2,
            shape.staging_words * 4,
            shape.max_rows * (1 + 2 * PARTS) * 4,
        )
        return cls(*(-(-size // 256) * 256 for size in sizes))


def workspace_bytes(shape: LaneShape) -> Bytes:
    """Device memory of one lane."""
    return Bytes(sum(LaneBytes.of(shape)) + SCRATCH_BYTES)


class GpuLane:
    """See the module's docstring. Row 0 of the tables belongs to padding."""

    def __init__(self, device: torch.device, memory: Tensor, shape: LaneShape) -> None:
        """`memory` is `workspace_bytes` of uint8."""
        self.device = device
        self.shape = shape
        self.calls = CudaCalls()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        parts = LaneBytes.of(shape)
        tables, tokens, logits, staging, drawn, scratch = torch.split(memory, [*parts, SCRATCH_BYTES])
        slots = shape.max_sequences + 1
        self.tables = tables.view(torch.int32)[: slots * shape.max_blocks].view(slots, shape.max_blocks)
        self.last_tokens = tokens.view(torch.int32)[:slots]
        self._logits = logits
        words = shape.staging_words
        self.staging = staging.view(torch.int32)[:words]
        sizes = [shape.max_rows, shape.max_rows * PARTS, shape.max_rows * PARTS]
        self.drawn, best, place = drawn.view(torch.int32)[: sum(sizes)].split(sizes)  # type: ignore[no-untyped-call]
        self._staging_address, self._drawn_address = self.staging.data_ptr(), self.drawn.data_ptr()
        self.best, self.place = best.view(torch.float32).view(-1, PARTS), place.view(-1, PARTS)
        with torch.cuda.stream(self.stream):
            self.last_tokens.zero_()
            self.tables[0].zero_()
            self.kernels = GpuKernels(device, self.tables, scratch)
        self.draws = DrawTable(slots)
        self._buffers = [Buffers(words, shape.max_batch) for _ in range(RING)]
        self._turn = 0
        self.apart_buffers = Buffers(words, shape.max_batch)
        """Those of the one step that is launched while others pass it by."""
        self._give_workspaces()
        self._anchor = self._anchored_pool()

    def _give_workspaces(self) -> None:
        """cuBLAS takes memory for each stream when it is first used there; in a capture it would be late."""
        one = torch.ones(16, 16, dtype=torch.bfloat16, device=self.device)
        for stream in (self.stream, self.capture_stream):
            with torch.cuda.stream(stream):
                torch.mm(one, one)
                torch.nn.functional.linear(one, one, one[0])
                stream.synchronize()

    def _anchored_pool(self) -> torch.cuda.CUDAGraph:
        """A graph that nobody drops: torch gives up a pool with its last graph, and cannot use it again."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.capture_stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="relaxed")
            self.last_tokens[:1].zero_()
            graph.capture_end()
        return graph

    def logits(self, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
        """`[rows, vocab]` where every step leaves its logits."""
        return self._logits.view(dtype)[: rows * vocab].view(rows, vocab)

    def draw_greedy(self, logits: Tensor, slots: Tensor) -> None:
        """Likeliest tokens of `logits [rows, vocabulary]` into `drawn`, and as newest tokens of `slots`."""
        rows = len(logits)
        draw_greedy(logits, self.best[:rows], self.place[:rows], slots, self.drawn[:rows], self.last_tokens)

    def draw_random(self, words: Tensor, places: DrawPlaces, logits: Tensor, slots: Tensor) -> None:
        """Tokens of the rows that are drawn at random, by what a step has brought along, in the place of the
        likeliest ones. `logits [rows, vocabulary]`, `slots [rows]`.
        """
        draw_random(
            logits,
            words[places.rows],
            temperature=words[places.temperature].view(torch.float32),
            top_k=words[places.top_k],
            top_p=words[places.top_p].view(torch.float32),
            min_p=words[places.min_p].view(torch.float32),
            uniforms=words[places.uniforms].view(torch.float64),
            slots=slots,
            out=self.drawn,
            last_tokens=self.last_tokens,
        )

    def event(self) -> Event:
        """All that is queued on the lane by now."""
        return Event(self.calls, self.stream)

    def send(self, buffers: Buffers, num_words: int) -> None:
        """Queue the copy of a step's words to the device, the first ones of `staging`."""
        target = Address(self._staging_address)
        self.calls.copy(target, buffers.address, Bytes(4 * num_words), self.stream.cuda_stream)

    def fetch_drawn(self, tokens: Tensor) -> None:
        """Queue the copy of the first tokens drawn to the host; `tokens` is pinned."""
        target, source = Address(tokens.data_ptr()), Address(self._drawn_address)
        self.calls.copy_back(target, source, Bytes(4 * len(tokens)), self.stream.cuda_stream)

    def next_buffers(self) -> Buffers:
        """For one step; called once a step."""
        self._turn = (self._turn + 1) % RING
        return self._buffers[self._turn]
