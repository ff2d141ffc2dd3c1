"""A `LocalWorker` on this machine's GPU, with as few slabs as a test wants."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from prism.config import DeviceConfig, ModelConfig
from prism.types import Bytes, MiB
from prism.worker.cuda_device import open_cuda
from prism.worker.needs import needs_of
from tests.support.local_worker import LocalWorker

SLAB = Bytes(2 * MiB)


def gpu_worker(
    models: dict[str, Path],
    *,
    lanes: int,
    spare_slabs: int = 100,
    model_options: dict[str, dict[str, Any]] | None = None,
) -> LocalWorker:
    """`spare_slabs` is what the lanes' workspaces leave for models."""
    clear_memory()  # what other tests left behind counts against the worker's reserve
    needs = needs_of([ModelConfig(name=name, path=str(path)) for name, path in models.items()])
    settings = {"kind": "cuda", "slab": SLAB, "lanes": lanes, "max_batch_size": 64}
    probe = open_cuda(DeviceConfig.model_validate(settings | {"memory": 1 << 30}), needs)
    taken = probe.pool.num_slabs - probe.num_slabs
    probe.close()
    device = open_cuda(
        DeviceConfig.model_validate(settings | {"memory": (taken + spare_slabs) * SLAB}), needs
    )
    torch.cuda.synchronize()
    return LocalWorker(models, spare_slabs, device=device, model_options=model_options)


def clear_memory() -> None:
    """Give back what torch holds for nobody.

    Not what cuBLAS holds: 32 MiB for each stream that it was used on, of which torch has 32 for all workers.
    """
    gc.collect()
    torch.cuda.empty_cache()


def rest(local: LocalWorker) -> None:
    """Wait for all of the device. While a capture is left alone that is an error, so they are ended first."""
    while local.device.backend.work_aside(1.0, urgent_only=False):
        pass
    torch.cuda.synchronize()
