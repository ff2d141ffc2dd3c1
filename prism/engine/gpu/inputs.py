"""What a step brings to the device: its inputs, and what the lane's tables do not know yet."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from prism.attention.gpu.decode import Split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import BLOCK_M, TILE_WORDS, tiles_of
from prism.attention.gpu.prefill import Chunk as PromptChunk
from prism.attention.kernels import KvView
from prism.engine.gpu.graphs import MAX_CHUNKS, Key
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging, aligned
from prism.engine.scheduler import Chunk


def stage_columns(staging: Staging, chunks: tuple[Chunk, ...], size: int, tokens_per_block: int) -> None:
    """`[3, size]`: slots, positions, blocks; the first staged words, where graphs read them."""
    padding = size - len(chunks)
    slots = [*(chunk.sequence.slot or 0 for chunk in chunks), *[0] * padding]
    positions = [*(chunk.start for chunk in chunks), *[-1] * padding]
    blocks = [*(c.sequence.blocks[c.start // tokens_per_block] for c in chunks), *[0] * padding]
    staging.ints(slots + positions + blocks)


class MixedSize(NamedTuple):
    """How much a step with prompt chunks brings along, padding included; decodes come first."""

    decodes: int
    prompt_rows: int
    sampled: int
    """Rows whose logits are wanted."""
    tiles: int
    """Of prefill's work list."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> MixedSize:
        """Without padding."""
        prompts = [chunk.length for chunk in chunks if chunk.length > 1]
        num_tiles = sum(-(-length // BLOCK_M) for length in prompts)
        return cls(len(chunks) - len(prompts), sum(prompts), sum(c.samples for c in chunks), num_tiles)

    @classmethod
    def of_graph(cls, key: Key) -> MixedSize:
        """Of all steps that a graph serves."""
        tiles = -(-key.prompt_rows // BLOCK_M) + MAX_CHUNKS
        return cls(key.size, key.prompt_rows, key.size + MAX_CHUNKS, tiles)

    @property
    def places(self) -> MixedPlaces:
        """Where it all lies among the step's words."""
        rows = self.decodes + self.prompt_rows
        counts = (rows, rows, rows, self.sampled, self.sampled, TILE_WORDS * self.tiles)
        starts = accumulate((aligned(count) for count in counts), initial=0)
        return MixedPlaces(*(slice(start, start + n) for start, n in zip(starts, counts, strict=False)))


class MixedPlaces(NamedTuple):
    """Words of a step with prompt chunks."""

    ids: slice
    positions: slice
    slots: slice
    last_rows: slice
    last_slots: slice
    tiles: slice


def stage_mixed(staging: Staging, chunks: Sequence[Chunk], size: MixedSize) -> None:
    """The first staged words of a step, decodes first, and padding behind decodes and behind prompts."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows: list[int] = []
    prompts: list[PromptChunk] = []

    def pad(rows: int) -> None:
        missing = rows - len(ids)
        ids.extend([0] * missing)
        positions.extend([-1] * missing)
        slots.extend([0] * missing)

    for sequence, start, length, samples in chunks:
        assert sequence.slot is not None
        if length > 1:
            if not prompts:
                pad(size.decodes)
            prompts.append(PromptChunk(len(ids), length, start + length, sequence.slot))
        ids += sequence.tokens[start : start + length] or [-1]
        positions += range(start, start + length)
        slots += [sequence.slot] * length
        if samples:
            last_rows.append(len(ids) - 1)
    pad(size.decodes + size.prompt_rows)
    last_slots = [slots[row] for row in last_rows]
    padding = [0] * (size.sampled - len(last_rows))
    tiles = [word for tile in tiles_of(prompts) for word in tile]
    tiles += [0] * (TILE_WORDS * size.tiles - len(tiles))
    for words in (ids, positions, slots, last_rows + padding, last_slots + padding, tiles):
        staging.ints(words)


def mixed_plan(words: Tensor, size: MixedSize, kv: KvView, num_heads: int, split: Split) -> GpuPlan:
    """Attention over what `stage_mixed` staged, once it is on the device."""
    places = size.places
    tiles = words[places.tiles].view(size.tiles, TILE_WORDS) if size.tiles else None
    return GpuPlan(kv, num_heads, words[places.slots], words[places.positions], size.decodes, split, tiles)


class TableNotes:
    """What the lane's tables do not know yet of the sequences of a step.

    With `newest_known` the step itself notes the block of each position.
    """

    def __init__(
        self, staging: Staging, chunks: tuple[Chunk, ...], kv: KvView, stride: int, *, newest_known: bool
    ) -> None:
        places: list[int] = []
        blocks: list[int] = []
        slots: list[int] = []
        tokens: list[int] = []
        for sequence, start, length, _ in chunks:
            assert sequence.slot is not None
            used = (start + length - 1) // kv.tokens_per_block + 1
            if sequence.num_tabled < used - newest_known:
                base = sequence.slot * stride
                places += range(base + sequence.num_tabled, base + used)
                blocks += sequence.blocks[sequence.num_tabled : used]
            sequence.num_tabled = used
            if length == 1 and start < len(sequence.tokens) and not sequence.is_token_placed:
                slots.append(sequence.slot)
                tokens.append(sequence.tokens[start])
        self._tables = (staging.ints(places), staging.ints(blocks)) if places else None
        self._tokens = (staging.ints(slots), staging.ints(tokens)) if slots else None

    def apply(self, words: Tensor, lane: GpuLane) -> None:
        """Queue the changes; most decodes have none."""
        if self._tables is not None:
            places, blocks = self._tables
            lane.tables.view(-1).index_copy_(0, words[places].long(), words[blocks])
        if self._tokens is not None:
            slots, tokens = self._tokens
            lane.last_tokens.index_copy_(0, words[slots].long(), words[tokens])
