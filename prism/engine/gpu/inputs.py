"""What a step brings to the device: its inputs, and what the lane's tables do not know yet."""

from __future__ import annotations

from torch import Tensor

from prism.attention.gpu.decode import Split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import Chunk as PromptChunk
from prism.attention.gpu.prefill import tiles_of
from prism.attention.kernels import KvView
from prism.engine.gpu.lane import GpuLane
from prism.engine.gpu.staging import Staging
from prism.engine.scheduler import Chunk


def stage_columns(staging: Staging, chunks: tuple[Chunk, ...], size: int, tokens_per_block: int) -> None:
    """`[3, size]`: slots, positions, blocks; the first staged words, where graphs read them."""
    padding = size - len(chunks)
    slots = [*(chunk.sequence.slot or 0 for chunk in chunks), *[0] * padding]
    positions = [*(chunk.start for chunk in chunks), *[-1] * padding]
    blocks = [*(c.sequence.blocks[c.start // tokens_per_block] for c in chunks), *[0] * padding]
    staging.ints(slots + positions + blocks)


class MixedInputs:
    """Inputs of a step with prompt chunks, decodes first."""

    def __init__(self, staging: Staging, chunks: tuple[Chunk, ...]) -> None:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        prompts: list[PromptChunk] = []
        for sequence, start, length, samples in chunks:
            assert sequence.slot is not None
            known = sequence.tokens[start : start + length]
            if length > 1:
                prompts.append(PromptChunk(len(ids), length, start + length, sequence.slot))
            ids += known or [-1]
            positions += range(start, start + length)
            slots += [sequence.slot] * length
            if samples:
                last_rows.append(len(ids) - 1)
        tiles = tiles_of(prompts)
        self.ids = staging.ints(ids)
        self._positions = staging.ints(positions)
        self._slots = staging.ints(slots)
        self.last_rows = staging.ints(last_rows)
        self.last_slots = staging.ints([slots[row] for row in last_rows])
        self._num_tiles = len(tiles)
        self._tiles = staging.ints([word for tile in tiles for word in tile])

    def plan(self, words: Tensor, kv: KvView, num_heads: int, num_decodes: int, split: Split) -> GpuPlan:
        """Attention over these inputs, once they are on the device."""
        tiles = words[self._tiles].view(self._num_tiles, 5) if self._num_tiles else None
        return GpuPlan(kv, num_heads, words[self._slots], words[self._positions], num_decodes, split, tiles)


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
