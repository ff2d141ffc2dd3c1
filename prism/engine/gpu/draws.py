"""Draws tokens on the device without waiting for it.

Requests whose draws depend on what was drawn before, or that report log-probabilities, take the way over the
host (engine/sampler.py); those have no tokens on their way when they are stepped.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from prism.engine.gpu.staging import Staging
from prism.engine.randomness import uniform
from prism.engine.sampler import draw, is_cut
from prism.engine.sequence import Sequence


class RandomDraws:
    """The rows of a step that are drawn at random; made while its inputs are staged."""

    def __init__(self, staging: Staging, rows: Seq[Sequence]) -> None:
        self._groups = []
        for cut in (False, True):  # apart, since an inversion depends on the order of the tokens
            places = [i for i, r in enumerate(rows) if r.params.temperature > 0 and is_cut(r) is cut]
            if places:
                self._groups.append((cut, staging.ints(places), _numbers(staging, [rows[i] for i in places])))

    def apply(self, words: Tensor, logits: Tensor, tokens: Tensor) -> bool:
        """Overwrite the greedy `tokens [rows]` of these rows, if any; `logits [rows, vocabulary]`."""
        for cut, places, numbers in self._groups:
            index = words[places].long()
            temperature, top_p, min_p = words[numbers.floats].view(torch.float32).view(3, -1)
            drawn = draw(
                logits[index],
                temperature=temperature,
                top_k=words[numbers.top_k],
                top_p=top_p,
                min_p=min_p,
                uniforms=words[numbers.uniforms].view(torch.float64),
                needs_order=cut,
            )
            tokens.index_copy_(0, index, drawn.to(tokens.dtype))
        return bool(self._groups)


class _Numbers(NamedTuple):
    """Where a group's numbers lie."""

    uniforms: slice
    floats: slice
    top_k: slice


def _numbers(staging: Staging, rows: Seq[Sequence]) -> _Numbers:
    params = [row.params for row in rows]
    return _Numbers(
        staging.doubles([uniform(r.params.seed, r.choice, r.draw_index) for r in rows]),
        staging.floats(
            [*(p.temperature for p in params), *(p.top_p for p in params), *(p.min_p for p in params)]
        ),
        staging.ints([p.top_k for p in params]),
    )
