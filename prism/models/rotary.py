"""Tables of the rotary position embedding (Su et al. 2021), with Llama 3's and linear scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism.modelspec import RopeScaling


def rotary_table(rope: RopeScaling, head_dim: int, num_positions: int) -> Tensor:
    """`[num_positions, head_dim]` fp32: cosines of all frequencies, then their sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3(rope: RopeScaling, frequencies: Tensor) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended (Llama 3.1's release)."""
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_position / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    slowed = torch.where(
        wavelengths > rope.original_max_position / low, frequencies / rope.factor, frequencies
    )
    between = (wavelengths <= rope.original_max_position / low) & (
        wavelengths >= rope.original_max_position / high
    )
    return torch.where(between, blended, slowed)
