"""Opens an NVIDIA GPU as a device."""

from __future__ import annotations

import torch

from prism.attention.flashinfer_kernels import HEAD_DIMS, WORKSPACE_BYTES, FlashInferKernels, build_kernels
from prism.attention.kernels import Kernels
from prism.attention.torch_kernels import TorchKernels
from prism.config import DeviceConfig
from prism.memory.cuda import CudaDriver
from prism.memory.pool import SlabPool
from prism.memory.slabs import LaneOwner
from prism.memory.tensors import tensor_at, torch_dtype
from prism.modelspec import ModelSpec
from prism.types import Bytes, DType, GiB, LaneId
from prism.weights.copiers import CudaCopier
from prism.worker.device import Device

TORCH_RESERVE = 4 * GiB
"""What torch's own allocator may take beside the pool, for the intermediate results of a step."""


def open_cuda(config: DeviceConfig) -> Device:
    """A GPU with its pool; the lane's workspace lies in the pool's first slabs. Raises `DriverError`."""
    device = torch.device("cuda", config.index)
    torch.cuda.set_device(device)
    driver = CudaDriver(config.index)
    torch.cuda.set_per_process_memory_fraction(TORCH_RESERVE / driver.memory_info().total, device)
    pool = SlabPool(driver, Bytes(config.slab), config.memory // config.slab)
    slabs = pool.take(LaneOwner(LaneId(0)), -(-WORKSPACE_BYTES // config.slab))
    workspace = tensor_at(pool.address(slabs[0]), (WORKSPACE_BYTES,), torch.uint8, None, device)
    fused, plain = FlashInferKernels(device, workspace), TorchKernels(device)

    def kernels(spec: ModelSpec) -> Kernels:
        """FlashInfer has no attention in fp32 nor for unusual heads; those run, more slowly, in torch."""
        is_fused = spec.dtype is not DType.F32 and spec.head_dim in HEAD_DIMS
        return fused if is_fused else plain

    def synchronize() -> None:
        torch.cuda.current_stream(device).synchronize()

    def prepare(spec: ModelSpec) -> None:
        """Compiles on the first use of a machine, which takes a minute; later a matter of milliseconds."""
        if kernels(spec) is fused:
            build_kernels(device, spec.head_dim, torch_dtype(spec.dtype))

    name, copier = f"cuda:{config.index}", CudaCopier(device)
    return Device(driver, pool, device, name, kernels, synchronize, prepare, copier, driver)
