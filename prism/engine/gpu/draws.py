"""Draws tokens on the device without waiting for it.

Requests whose draws depend on what was drawn before, or that report log-probabilities, take the way over the
host (engine/sampler.py); those have no tokens on their way when they are stepped.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from prism.attention.gpu.sampling import draw_random
from prism.engine.gpu.staging import Staging
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence


class RandomDraws:
    """The rows of a step that are drawn at random; made while its inputs are staged."""

    def __init__(self, staging: Staging, rows: Seq[Sequence]) -> None:
        places = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        self._places = staging.ints(places)
        self._numbers = _numbers(staging, [rows[i] for i in places]) if places else None

    def apply(
        self, words: Tensor, logits: Tensor, slots: Tensor, tokens: Tensor, last_tokens: Tensor
    ) -> None:
        """Put tokens for these rows, if any, in the place of the likeliest ones.

        `logits [rows, vocabulary]`; `tokens [rows]` and `slots [rows]` of `last_tokens` int32.
        """
        numbers = self._numbers
        if numbers is None:
            return
        draw_random(
            logits,
            words[self._places],
            temperature=words[numbers.temperature].view(torch.float32),
            top_k=words[numbers.top_k],
            top_p=words[numbers.top_p].view(torch.float32),
            min_p=words[numbers.min_p].view(torch.float32),
            uniforms=words[numbers.uniforms].view(torch.float64),
            slots=slots,
            out=tokens,
            last_tokens=last_tokens,
        )


class _Numbers(NamedTuple):
    """Where the rows' numbers lie."""

    uniforms: slice
    temperature: slice
    top_p: slice
    min_p: slice
    top_k: slice


def _numbers(staging: Staging, rows: Seq[Sequence]) -> _Numbers:
    params = [row.params for row in rows]
    return _Numbers(
        staging.doubles(uniforms([row.random_stream for row in rows], [row.draw_index for row in rows])),
        staging.floats([p.temperature for p in params]),
        staging.floats([p.top_p for p in params]),
        staging.floats([p.min_p for p in params]),
        staging.ints([p.top_k for p in params]),
    )
