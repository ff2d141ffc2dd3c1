"""Gives every configured model a home device. Pure.

Those whose device is given go there. The others follow, largest first, each to the device on which the
weights assigned so far fill the smallest share of its memory after adding it, among those that can hold it at
all. Homes only say where a model is loaded when it is asked for, so they may overcommit memory.
"""

from __future__ import annotations

from prism.controller.state import DeviceSize, ModelSize
from prism.types import ModelId, WorkerId


def place(models: tuple[ModelSize, ...], devices: tuple[DeviceSize, ...]) -> dict[ModelId, WorkerId]:
    """A home for each model; the order of `models` is kept."""
    assigned = {device.worker: 0 for device in devices}
    homes: dict[ModelId, WorkerId] = {}
    for model in sorted(models, key=lambda m: (m.worker is None, -m.weights_bytes, m.model)):
        able = tuple(device for device in devices if _holds(device, model.weights_bytes))
        home = model.worker or _emptiest(able or devices, assigned, model.weights_bytes)
        assigned[home] += model.weights_bytes
        homes[model.model] = home
    return {model.model: homes[model.model] for model in models}


def _holds(device: DeviceSize, weights: int) -> bool:
    """The model fits alone: its weights in whole slabs, and one slab of KV."""
    return -(-weights // device.slab_bytes) + 1 <= device.memory_bytes // device.slab_bytes


def _emptiest(devices: tuple[DeviceSize, ...], assigned: dict[WorkerId, int], added: int) -> WorkerId:
    """The device that is least full once `added` bytes have come."""
    return min(devices, key=lambda d: ((assigned[d.worker] + added) / d.memory_bytes, d.worker)).worker
