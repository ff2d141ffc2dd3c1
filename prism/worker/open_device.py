"""Opens the device that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prism.config import DeviceConfig, ModelConfig
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.types import Bytes
from prism.worker.cpu_device import cpu_device
from prism.worker.device import Device
from prism.worker.needs import needs_of
from prism.worker.rates import measure_rates


def open_device(config: DeviceConfig, models: Sequence[ModelConfig]) -> Device:
    """Opens a device for these models and creates its pool. Raises `DriverError`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    match config.kind:
        case "cpu":
            device = _open_cpu(config)
        case "cuda":
            from prism.worker.cuda_device import open_cuda

            device = open_cuda(config, needs_of(models))
    device.rates = measure_rates(device.device)
    return device


def _open_cpu(config: DeviceConfig) -> Device:
    num_slabs = config.memory // config.slab
    driver = HostDriver(Bytes(num_slabs * config.slab))
    pool = SlabPool(driver, Bytes(config.slab), num_slabs)
    return cpu_device(driver, pool, f"cpu:{config.index}")
