"""Steps without a scheduler."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prism.engine.step import Chunk, Step


def step_of(chunks: Iterable[Chunk]) -> Step:
    """One step of these chunks; those of one token that draw are decodes."""
    decodes, prompts = [], []
    for chunk in chunks:
        (decodes if chunk.length == 1 and chunk.samples else prompts).append(chunk)
    positions = np.array([chunk.start for chunk in decodes], np.int32)
    return Step(tuple(chunk.sequence for chunk in decodes), positions, tuple(prompts))
