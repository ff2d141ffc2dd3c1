"""Draws tokens on the device without waiting for it.

Requests whose draws depend on what was drawn before, or that report log-probabilities, take the way over the
host (engine/sampler.py); those have no tokens on their way when they are stepped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prism.attention.gpu.sampling import draw_random
from prism.engine.gpu.draw_table import StagedDraws


def draw(
    staged: StagedDraws, words: Tensor, logits: Tensor, slots: Tensor, tokens: Tensor, last_tokens: Tensor
) -> None:
    """Put tokens for the rows that are drawn at random in the place of the likeliest ones.

    `logits [rows, vocabulary]`; `tokens [rows]` and `slots [rows]` of `last_tokens` int32.
    """
    draw_random(
        logits,
        words[staged.places],
        temperature=words[staged.temperature].view(torch.float32),
        top_k=words[staged.top_k],
        top_p=words[staged.top_p].view(torch.float32),
        min_p=words[staged.min_p].view(torch.float32),
        uniforms=words[staged.uniforms].view(torch.float64),
        slots=slots,
        out=tokens,
        last_tokens=last_tokens,
    )
