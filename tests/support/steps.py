"""Steps without a scheduler."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prism.engine.step import Chunk, Step


def step_of(chunks: Iterable[Chunk]) -> Step:
    """One step of these chunks; those of one token that draw are decodes, each of which may begin a block."""
    decodes, prompts = [], []
    for chunk in chunks:
        (decodes if chunk.length == 1 and chunk.samples else prompts).append(chunk)
    positions = [chunk.start for chunk in decodes]
    context = sum(positions) + len(positions)
    sequences = tuple(chunk.sequence for chunk in decodes)
    return Step(sequences, np.array(positions, np.int32), context, tuple(prompts), begun=sequences)
