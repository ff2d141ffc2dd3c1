"""What a step of decodes brings to the device: columns, and what the lane's tables do not know yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prism.engine.gpu.staging import Staging
from prism.engine.sequence import Sequence
from prism.engine.step import Step

if TYPE_CHECKING:  # needs Triton, which only GPUs have
    from prism.engine.gpu.lane import GpuLane


_PADDING = np.array([[0], [-1], [0]], np.int32)


def slots_of(sequences: Iterable[Sequence]) -> NDArray[np.intp]:
    """Their rows in the lane's tables; all of them run, so each has one."""
    return np.array([sequence.slot for sequence in sequences], np.intp)


class DecodeRows:
    """Rows and last blocks of decodes, kept from one step of theirs to the next.

    Mostly the same sequences decode again, and whatever is new of one of them, it has begun a block: those
    alone are looked at.
    """

    def __init__(self) -> None:
        self.slots = np.empty(0, np.intp)
        self.blocks = np.empty(0, np.int32)
        self._decodes: tuple[Sequence, ...] = ()
        self._places: dict[Sequence, int] = {}

    def look(self, step: Step) -> None:
        """Those of this step, which has no prompts; each has a row."""
        if step.decodes != self._decodes:
            self._decodes = step.decodes
            self._places = {sequence: place for place, sequence in enumerate(step.decodes)}
            self.slots = slots_of(step.decodes)
            self.blocks = np.array([sequence.blocks[-1] for sequence in step.decodes], np.int32)
            return
        if step.begun:
            places = [self._places[sequence] for sequence in step.begun]
            self.slots[places] = slots_of(step.begun)
            self.blocks[places] = [sequence.blocks[-1] for sequence in step.begun]

    def forget(self) -> None:
        """A step with prompts has come between."""
        self._decodes = ()


def stage_columns(staging: Staging, step: Step, rows: DecodeRows, size: int) -> None:
    """`[3, size]`: slots, positions, blocks; the first staged words, where graphs read them.

    The block of a decode's position is its last one.
    """
    count = len(step.decodes)
    columns = staging.room(3 * size).reshape(3, size)
    columns[0, :count] = rows.slots
    columns[1, :count] = step.positions
    columns[2, :count] = rows.blocks
    if count < size:
        columns[:, count:] = _PADDING


class TableNotes:
    """What the lane's tables do not know yet of the sequences of a step: decodes that it knows begin nothing.

    With `newest_known` the step itself notes the last block of each decode.
    """

    def __init__(self, staging: Staging, step: Step, stride: int, *, newest_known: bool) -> None:
        """Rows of the tables have `stride` places."""
        places: list[int] = []
        blocks: list[int] = []
        for sequence in (*step.begun, *(chunk.sequence for chunk in step.prompts)):
            known, held = sequence.num_tabled, len(sequence.blocks)
            is_noted = newest_known and known == held - 1
            if known < held and not is_noted:
                assert sequence.slot is not None
                places += range(sequence.slot * stride + known, sequence.slot * stride + held)
                blocks += sequence.blocks[known:]
            sequence.num_tabled = held
        new = [sequence for sequence in step.begun if not sequence.is_token_placed]
        self._tables = (staging.ints(places), staging.ints(blocks)) if places else None
        self._tokens = None
        self.are_any = bool(places or new)
        if new:
            newest = [sequence.tokens[sequence.num_computed - 1] for sequence in new]
            self._tokens = (staging.ints(slots_of(new)), staging.ints(newest))

    def apply(self, words: Tensor, lane: GpuLane) -> None:
        """Queue the changes; most decodes have none."""
        if self._tables is not None:
            places, blocks = self._tables
            lane.tables.view(-1).index_copy_(0, words[places].long(), words[blocks])
        if self._tokens is not None:
            slots, tokens = self._tokens
            lane.last_tokens.index_copy_(0, words[slots].long(), words[tokens])
