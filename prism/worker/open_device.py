"""Opens the device that a configuration names."""

from __future__ import annotations

import torch

from prism.attention.torch_kernels import TorchKernels
from prism.config import DeviceConfig
from prism.memory.driver import Driver
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.modelspec import ModelSpec
from prism.types import Bytes, DType
from prism.weights.copiers import HostCopier
from prism.worker.device import Device


def open_device(config: DeviceConfig) -> Device:
    """Opens a device and creates its pool. Raises `DriverError`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    match config.kind:
        case "cpu":
            return _open_cpu(config)
        case "cuda":
            from prism.worker.cuda_device import open_cuda

            return open_cuda(config)


def _open_cpu(config: DeviceConfig) -> Device:
    num_slabs = config.memory // config.slab
    driver = HostDriver(Bytes(num_slabs * config.slab))
    pool = SlabPool(driver, Bytes(config.slab), num_slabs)
    return cpu_device(driver, pool, f"cpu:{config.index}")


def cpu_device(driver: Driver, pool: SlabPool, name: str) -> Device:
    """A CPU over a given driver. Its steps have run when they return."""
    device = torch.device("cpu")
    kernels = TorchKernels(device)

    def prepare(spec: ModelSpec) -> None:
        if spec.dtype is DType.BF16:
            kernels.cpu_linear.tune()

    return Device(driver, pool, device, name, lambda _: kernels, lambda: None, prepare, HostCopier())
