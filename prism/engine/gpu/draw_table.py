"""What draws depend on, by row of the lane's tables: written once for a sequence, gathered at each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.engine.gpu.staging import Staging
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence

AHEAD = 32
"""Uniform numbers that are made at a time for a row: for two rows that takes no longer than one of each."""
UNKNOWN = -1 << 30


class StagedDraws(NamedTuple):
    """Where the numbers of a step's random draws lie among its words."""

    places: slice
    """Rows of the step that are drawn at random."""
    uniforms: slice
    temperature: slice
    top_p: slice
    min_p: slice
    top_k: slice


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

    def enter(self, sequences: Iterable[Sequence]) -> None:
        """These are about to draw in their rows for the first time."""
        for sequence in sequences:
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

    def stage(
        self, staging: Staging, slots: NDArray[np.intp], lengths: NDArray[np.int32]
    ) -> StagedDraws | None:
        """Numbers for those of `slots` that draw at random, behind `lengths` tokens; None without any."""
        (places,) = (self._temperature[slots] > 0).nonzero()
        if not len(places):
            return None
        slots = slots[places]
        numbers = self._numbers(slots, lengths[places])
        settings = self._settings[:, slots]
        return StagedDraws(staging.ints(places), staging.doubles(numbers), *staging.rows(settings))

    def _numbers(self, slots: NDArray[np.intp], lengths: NDArray[np.int32]) -> NDArray[np.float64]:
        ahead = lengths - self._begins[slots]
        (missing,) = (ahead // AHEAD).nonzero()
        if len(missing):
            rows, begins = slots[missing], lengths[missing]
            positions = (begins - self._prompt_lens[rows])[:, None] + np.arange(AHEAD)
            self._uniforms[rows] = uniforms(self._streams[rows][:, None], positions)
            self._begins[rows] = begins
            ahead[missing] = 0
        numbers: NDArray[np.float64] = self._uniforms[slots, ahead]
        return numbers
