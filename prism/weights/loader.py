"""Copies packed weights to a device, chunk by chunk in execution order, and proves that they arrived.

Runs in a thread beside the worker's loop, in calls that release the GIL. The loop watches `progress`: what
lies below it is on the device, so the first layers may run while the last ones are still on their way.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray

from prism.errors import CheckpointError
from prism.types import Bytes, MiB
from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights
from prism.weights.copiers import Copier, CudaCopier, HostCopier

_STEP = Bytes(32 * MiB)


class LoadOutcome(StrEnum):
    """How a load ended that did not fail."""

    LOADED = "loaded"
    CANCELLED = "cancelled"


class LoadJob:
    """One copy of one model. `run` is called once, from any thread; the rest may be used from others."""

    def __init__(
        self,
        packed: PackedWeights,
        target: torch.Tensor,
        chunk_bytes: Bytes = _STEP,
        *,
        source_is_pinned: bool = False,
    ) -> None:
        """Copy to the first bytes of `target`, [bytes] uint8 over the model's arena, `chunk_bytes` at a time.

        `source_is_pinned` says that the whole mapping is registered with CUDA; else copies to a GPU pass
        through two pinned buffers of a chunk each. Chunks are multiples of the checksums' 4 MiB.
        """
        assert target.dtype is torch.uint8 and target.is_contiguous() and target.dim() == 1
        assert target.numel() >= packed.total_bytes, f"{target.numel()} bytes for {packed.total_bytes}"
        assert chunk_bytes > 0 and chunk_bytes % CHUNK_BYTES == 0, f"chunks of {chunk_bytes} bytes"
        self._packed = packed
        self._target = target[: packed.total_bytes]
        self._chunk_bytes = chunk_bytes
        self._source_is_pinned = source_is_pinned
        self._progress = Bytes(0)
        self._is_cancelled = False

    @property
    def progress(self) -> Bytes:
        """Bytes from the beginning that are on the device; their checksums may still be wrong."""
        return self._progress

    @property
    def total_bytes(self) -> Bytes:
        """Bytes to copy."""
        return self._packed.total_bytes

    def cancel(self) -> None:
        """Make `run` return soon, between two chunks."""
        self._is_cancelled = True

    def run(self) -> LoadOutcome:
        """Copy and verify. However it ends, nothing writes to the target any more.

        Raises `CheckpointError` when the bytes on the device are not those that were packed.
        """
        copier = self._copier()
        try:
            for begin in range(0, self.total_bytes, self._chunk_bytes):
                if self._is_cancelled:
                    return LoadOutcome.CANCELLED
                end = min(begin + self._chunk_bytes, self.total_bytes)
                self._progress = copier.copy(Bytes(begin), Bytes(end))
        finally:
            copier.drain()
        self._progress = self.total_bytes
        self._verify(copier.checksums())
        return LoadOutcome.LOADED

    def _copier(self) -> Copier:
        if self._target.device.type == "cpu":
            return HostCopier(self._packed, self._target)
        return CudaCopier(
            self._packed, self._target, self._chunk_bytes, source_is_pinned=self._source_is_pinned
        )

    def _verify(self, arrived: NDArray[np.uint64]) -> None:
        wrong = np.flatnonzero(arrived != self._packed.checksums)
        if len(wrong):
            problem = f"{len(wrong)} of {len(arrived)} chunks arrived damaged, the first at byte"
            raise CheckpointError(f"{problem} {wrong[0] * CHUNK_BYTES}", file=f"packed {self._packed.model}")
