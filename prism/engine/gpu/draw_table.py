"""What draws depend on, by row of the lane's tables: written once for a sequence, gathered at each step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.engine.gpu.staging import Staging, aligned
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence

AHEAD = 32
"""Uniform numbers that are made at a time for a row: for few rows that takes no longer than one of each."""
MOST_AHEAD = 128
"""Rows for which that pays."""
UNKNOWN = -1 << 30
MOST_BATCHES = 64
"""That are kept: one for each model of a lane as long as nobody comes."""


class DrawPlaces(NamedTuple):
    """Where the numbers of a step's random draws lie among its words; graphs read them there."""

    rows: slice
    """Rows of the step that are drawn at random; the others of these words are -1."""
    temperature: slice
    top_p: slice
    min_p: slice
    top_k: slice
    uniforms: slice

    @classmethod
    def behind(cls, num_words: int, size: int) -> DrawPlaces:
        """Room for `size` draws behind so many words."""
        counts = (*[size] * 5, 2 * size)
        starts = accumulate((aligned(count) for count in counts), initial=aligned(num_words))
        return cls(*(slice(start, start + n) for start, n in zip(starts, counts, strict=False)))


class _Batch(NamedTuple):
    """Rows that draw at random, of those that one step has."""

    slots: NDArray[np.intp]
    rows: NDArray[np.intp]
    """Their places among all rows of the step."""
    words: NDArray[np.int32]
    """The same, and their settings, as they are staged."""
    is_part: bool
    """Others of the step do not."""


class DrawTable:
    """That of one lane: an array for each of what the draws of a row depend on."""

    def __init__(self, num_slots: int) -> None:
        self._streams = np.zeros(num_slots, np.uint64)
        self._prompt_lens = np.zeros(num_slots, np.int32)
        self._settings = np.zeros((4, num_slots), np.int32)
        self._temperature, self._top_p, self._min_p = self._settings[:3].view(np.float32)
        self._top_k = self._settings[3]
        self._with_history: set[int] = set()
        self._uniforms = np.zeros((num_slots, AHEAD))
        """Numbers of the next draws of each row."""
        self._begins = np.full(num_slots, UNKNOWN, np.int32)
        """Behind how many tokens the first of these is drawn."""
        self._batches: dict[tuple[bytes, int], _Batch] = {}
        """By rows and room, as long as no row becomes another's."""

    def enter(self, sequences: Iterable[Sequence]) -> None:
        """These are about to draw in their rows for the first time."""
        for sequence in sequences:
            self._batches.clear()
            slot, params = sequence.slot, sequence.params
            assert slot is not None
            self._streams[slot] = sequence.random_stream
            self._prompt_lens[slot] = sequence.prompt_len
            self._temperature[slot] = params.temperature
            self._top_p[slot] = params.top_p
            self._min_p[slot] = params.min_p
            self._top_k[slot] = params.top_k
            self._begins[slot] = UNKNOWN
            if sequence.needs_history:
                self._with_history.add(slot)
            else:
                self._with_history.discard(slot)

    def needs_host(self, slots: NDArray[np.intp]) -> bool:
        """Draws of one of these depend on earlier tokens, or report more than a token."""
        return bool(self._with_history) and not self._with_history.isdisjoint(slots.tolist())

    def stage(self, staging: Staging, slots: NDArray[np.intp], lengths: NDArray[np.int32], size: int) -> None:
        """Numbers for those of `slots` that draw at random, behind `lengths` tokens, in room for `size`.

        `DrawPlaces.behind` what is staged says where. None are drawn here if one needs the host.
        """
        batch = self._batch(slots, size)
        staging.ints(batch.words)
        numbers: NDArray[np.float64] | tuple[()] = ()
        if len(batch.rows):
            numbers = self._numbers(batch.slots, lengths[batch.rows] if batch.is_part else lengths)
        staging.doubles(numbers, size)

    def _batch(self, slots: NDArray[np.intp], size: int) -> _Batch:
        """Those of these rows that draw at random; kept, since mostly the same rows are stepped again."""
        key = slots.tobytes(), size
        batch = self._batches.get(key)
        if batch is None:
            if len(self._batches) >= MOST_BATCHES:
                self._batches.clear()
            batch = self._batches[key] = self._new_batch(slots, size)
        return batch

    def _new_batch(self, slots: NDArray[np.intp], size: int) -> _Batch:
        rows = np.flatnonzero(self._temperature[slots] > 0)
        if self.needs_host(slots):
            rows = rows[:0]
        drawing, count = slots[rows], len(rows)
        words = np.zeros((5, aligned(size)), np.int32)
        words[0, :count], words[0, count:], words[1:, :count] = rows, -1, self._settings[:, drawing]
        return _Batch(drawing, rows, words.ravel(), count < len(slots))

    def _numbers(self, slots: NDArray[np.intp], lengths: NDArray[np.int32]) -> NDArray[np.float64]:
        """When a row has none left, those get new ones, too, that have used half of theirs: where rows began
        at different steps, some would be made at each."""
        if len(slots) > MOST_AHEAD:
            return uniforms(self._streams[slots], lengths - self._prompt_lens[slots])
        used = lengths - self._begins[slots]
        if (used // AHEAD).any():
            (due,) = (used // (AHEAD // 2)).nonzero()
            rows, begins = slots[due], lengths[due]
            positions = (begins - self._prompt_lens[rows])[:, None] + np.arange(AHEAD)
            self._uniforms[rows] = uniforms(self._streams[rows][:, None], positions)
            self._begins[rows] = begins
            used[due] = 0
        numbers: NDArray[np.float64] = self._uniforms[slots, used]
        return numbers
