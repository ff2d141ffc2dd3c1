"""Gives every configured model a home device. Pure.

Largest first, each to the device on which the weights assigned so far fill the smallest share of its memory
after adding it. Homes only say where a model is loaded when it is asked for, so they may overcommit memory.
"""

from __future__ import annotations

from prism.controller.state import DeviceSize, ModelSize
from prism.types import ModelId, WorkerId


def place(models: tuple[ModelSize, ...], devices: tuple[DeviceSize, ...]) -> dict[ModelId, WorkerId]:
    """A home for each model; the order of `models` is kept."""
    assigned = {device.worker: 0 for device in devices}
    homes: dict[ModelId, WorkerId] = {}
    for model in sorted(models, key=lambda m: (-m.weights_bytes, m.model)):
        best = min(
            devices, key=lambda d: ((assigned[d.worker] + model.weights_bytes) / d.memory_bytes, d.worker)
        )
        assigned[best.worker] += model.weights_bytes
        homes[model.model] = best.worker
    return {model.model: homes[model.model] for model in models}
