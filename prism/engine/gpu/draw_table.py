"""What draws depend on, by row of the lane's tables: written once for a sequence, gathered at each step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.engine.gpu.staging import Staging
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence

_ROW = np.dtype(
    [
        ("random_stream", np.uint64),
        ("prompt_len", np.int64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("needs_history", np.bool_),
    ]
)


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
    """That of one lane."""

    def __init__(self, num_slots: int) -> None:
        self._rows = np.zeros(num_slots, _ROW)

    def enter(self, sequences: Iterable[Sequence]) -> None:
        """These are about to draw in their rows for the first time."""
        for sequence in sequences:
            p = sequence.params
            self._rows[sequence.slot] = (
                sequence.random_stream,
                sequence.prompt_len,
                p.temperature,
                p.top_p,
                p.min_p,
                p.top_k,
                sequence.needs_history,
            )

    def needs_host(self, slots: NDArray[np.int32]) -> bool:
        """Draws of one of these depend on earlier tokens, or report more than a token."""
        return bool(self._rows["needs_history"][slots].any())

    def stage(
        self, staging: Staging, slots: NDArray[np.int32], lengths: NDArray[np.int32]
    ) -> StagedDraws | None:
        """Numbers for those of `slots` that draw at random, behind `lengths` tokens; None without any."""
        rows = self._rows[slots]
        places = np.flatnonzero(rows["temperature"] > 0)
        if not len(places):
            return None
        drawn = rows[places]
        numbers = uniforms(drawn["random_stream"], lengths[places] - drawn["prompt_len"])
        return StagedDraws(
            staging.ints(places),
            staging.doubles(numbers),
            staging.floats(drawn["temperature"]),
            staging.floats(drawn["top_p"]),
            staging.floats(drawn["min_p"]),
            staging.ints(drawn["top_k"]),
        )
