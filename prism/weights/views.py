"""The tensors of a model over its arena, or over any other place that holds its buffer."""

from __future__ import annotations

import torch

from prism.memory.tensors import tensor_at, torch_dtype
from prism.types import Address
from prism.weights.layout import Layout


def view_weights(layout: Layout, base: Address, device: torch.device) -> dict[str, torch.Tensor]:
    """One tensor per entry of the layout, by name. Nothing is read: there may be no memory at `base` yet."""
    return {
        entry.name: tensor_at(
            Address(base + entry.offset), entry.shape, torch_dtype(entry.dtype), device=device
        )
        for entry in layout.entries
    }
