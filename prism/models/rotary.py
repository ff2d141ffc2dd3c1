"""Tables of the rotary position embedding (Su et al. 2021), with Llama 3's and linear scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism.modelspec import RopeScaling

_AT_ONCE = 4096
"""Positions: their angles take 1 MiB with heads of 128."""


def rotary_table(rope: RopeScaling, head_dim: int, num_positions: int) -> Tensor:
    """`[num_positions, head_dim]` fp32: cosines of all frequencies, then their sines."""
    table = torch.empty(num_positions, head_dim)
    write_rotary_table(rotary_frequencies(rope, head_dim), table)
    return table


def write_rotary_table(frequencies: Tensor, table: Tensor) -> None:
    """The same into `table`, on the device where both are."""
    half = len(frequencies)
    for first in range(0, len(table), _AT_ONCE):
        part = table[first : first + _AT_ONCE]
        positions = torch.arange(first, first + len(part), device=table.device)
        angles = torch.outer(positions.float(), frequencies)
        torch.cos(angles, out=part[:, :half])
        torch.sin(angles, out=part[:, half:])


def rotary_frequencies(rope: RopeScaling, head_dim: int) -> Tensor:
    """`[head_dim / 2]` fp32: by how much the angles grow from one position to the next."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies


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
