"""What a step brings to the device; its columns, if it has decodes alone, are in columns.py."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism.attention.gpu.decode import Split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import TILE, TILE_WORDS, tiles_of
from prism.attention.gpu.prefill import Chunk as PromptChunk
from prism.attention.kernels import KvView
from prism.engine.gpu.columns import TableNotes, slots_of
from prism.engine.gpu.draw_table import DrawPlaces
from prism.engine.gpu.graphs import MAX_CHUNKS, Key
from prism.engine.gpu.lane import Buffers, GpuLane
from prism.engine.gpu.staging import Staging, aligned
from prism.engine.step import Step


class MixedSize(NamedTuple):
    """How much a step with prompt chunks brings along, padding included; decodes come first."""

    decodes: int
    prompt_rows: int
    sampled: int
    """Rows whose logits are wanted."""
    tiles: int
    """Of prefill's work list."""

    @classmethod
    def of(cls, step: Step) -> MixedSize:
        """Without padding."""
        lengths = [chunk.length for chunk in step.prompts]
        num_tiles = sum(-(-length // TILE) for length in lengths)
        num_drawing = sum(chunk.samples for chunk in step.prompts)
        return cls(len(step.decodes), sum(lengths), len(step.decodes) + num_drawing, num_tiles)

    @classmethod
    def of_graph(cls, key: Key) -> MixedSize:
        """Of all steps that a graph serves."""
        tiles = -(-key.prompt_rows // TILE) + MAX_CHUNKS
        return cls(key.size, key.prompt_rows, key.size + MAX_CHUNKS, tiles)

    @property
    def places(self) -> MixedPlaces:
        """Where it all lies among the step's words."""
        rows = self.decodes + self.prompt_rows
        counts = (rows, rows, rows, self.sampled, self.sampled, TILE_WORDS * self.tiles)
        *starts, end = accumulate((aligned(count) for count in counts), initial=0)
        places = [slice(start, start + n) for start, n in zip(starts, counts, strict=True)]
        draws = DrawPlaces.behind(end, self.sampled)
        ids, positions, slots, last_rows, last_slots, tiles = places
        return MixedPlaces(ids, positions, slots, last_rows, last_slots, tiles, draws)


class MixedPlaces(NamedTuple):
    """Words of a step with prompt chunks."""

    ids: slice
    positions: slice
    slots: slice
    last_rows: slice
    last_slots: slice
    tiles: slice
    draws: DrawPlaces


class MixedForm(NamedTuple):
    """What a step with prompt chunks is launched or captured for."""

    size: MixedSize
    split: Split
    """Of the decodes' contexts."""


def stage_mixed(staging: Staging, step: Step, slots: NDArray[np.intp], size: MixedSize) -> None:
    """The first staged words of a step, decodes first, and padding behind decodes and behind prompts.

    `slots` are those of the decodes, whose tokens the device has: their ids are -1.
    """
    count = len(slots)
    rows = np.zeros((3, size.decodes + size.prompt_rows), np.int32)
    ids, positions, row_slots = rows
    ids[:count] = -1
    positions[:] = -1
    positions[:count] = step.positions
    row_slots[:count] = slots
    last_rows = list(range(count))
    prompts: list[PromptChunk] = []
    end = size.decodes
    for sequence, start, length, samples in step.prompts:
        assert sequence.slot is not None
        begin, end = end, end + length
        prompts.append(PromptChunk(begin, length, start + length, sequence.slot))
        ids[begin:end] = sequence.tokens[start : start + length]
        positions[begin:end] = range(start, start + length)
        row_slots[begin:end] = sequence.slot
        if samples:
            last_rows.append(end - 1)
    last = np.zeros((2, size.sampled), np.int32)
    last[:, : len(last_rows)] = last_rows, row_slots[last_rows]
    tiles = np.zeros((size.tiles, TILE_WORDS), np.int32)
    if prompts:
        used = tiles_of(prompts)
        tiles[: len(used)] = used
    for words in (*rows, *last, tiles.ravel()):
        staging.ints(words)


def mixed_plan(words: Tensor, form: MixedForm, kv: KvView, num_heads: int) -> GpuPlan:
    """Attention over what `stage_mixed` staged, once it is on the device."""
    size, split, places = form.size, form.split, form.size.places
    tiles = words[places.tiles].view(size.tiles, TILE_WORDS) if size.tiles else None
    return GpuPlan(kv, num_heads, words[places.slots], words[places.positions], size.decodes, split, tiles)


class StepInputs:
    """What any step brings along behind its columns, and where its tokens go."""

    def __init__(
        self,
        buffers: Buffers,
        staging: Staging,
        step: Step,
        slots: NDArray[np.intp],
        lane: GpuLane,
        size: int,
        *,
        newest_known: bool,
    ) -> None:
        """What has been staged are columns, or what a step with prompts has instead.

        `slots` are those of the decodes, `size` is the number of rows that are drawn, padding included; see
        `TableNotes` for `newest_known`.
        """
        self.sampled = step.sampled
        self.tokens = buffers.tokens[: len(self.sampled)]
        self._buffers, self._staging, self._lane = buffers, staging, lane
        drawing = [chunk for chunk in step.prompts if chunk.samples]
        lengths = step.positions + 1
        if drawing:
            slots = np.concatenate([slots, slots_of(chunk.sequence for chunk in drawing)])
            ends = np.array([chunk.start + chunk.length for chunk in drawing], np.int32)
            lengths = np.concatenate([lengths, ends])
        first = (*step.begun, *(chunk.sequence for chunk in drawing))
        new = [sequence for sequence in first if not sequence.is_token_placed]
        lane.draws.enter(new)
        self.on_host = lane.draws.needs_host(slots)
        """Its tokens are drawn by the host."""
        lane.draws.stage(staging, slots, lengths, size)
        self._notes = TableNotes(staging, step, lane.shape.max_blocks, newest_known=newest_known)
        for sequence in new:  # for the steps behind this one
            sequence.is_token_placed = True

    @property
    def is_plain(self) -> bool:
        """Words for kernels that a graph may hold are all that it brings along."""
        return not (self.on_host or self._notes.are_any)

    def send(self) -> Tensor:
        """Queue the copy of all words, and the changes to the lane's tables."""
        self.send_words()
        words = self._lane.staging[: self._staging.num_words]
        self._notes.apply(words, self._lane)
        return words

    def send_words(self) -> None:
        """Queue the copy of all words."""
        self._lane.send(self._buffers, self._staging.num_words)
