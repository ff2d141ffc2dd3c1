"""A CPU as a device: one lane, whose work has run when it is launched."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence

import torch

from prism.attention.kernels import KvView
from prism.attention.torch_kernels import TorchKernels
from prism.engine.kv_blocks import Move
from prism.engine.runner import GraphUsage, Runner
from prism.engine.scheduler import UNBOUNDED
from prism.engine.torch_runner import TorchRunner
from prism.memory.driver import Driver
from prism.memory.pool import SlabPool
from prism.models.decoder import Decoder
from prism.modelspec import ModelSpec
from prism.types import Bytes, DType, LaneId
from prism.weights.copiers import Copier, HostCopier
from prism.weights.registrations import Pinner
from prism.worker.copies import CopyWork, Run
from prism.worker.device import Device, Guess
from prism.worker.lanes import Work
from prism.worker.notices import Notices

MAX_SEQUENCES = 65536
"""A CPU keeps no tables for its sequences, so this only has to be more than can ever run."""


class Copied:
    """Work that has run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def is_done(self) -> bool:
        """Always."""
        return True

    def seconds(self) -> float:
        """See `CopyWork.seconds`."""
        return self._seconds


class TorchBackend:
    """Plain torch operations."""

    num_lanes = 1
    max_sequences = MAX_SEQUENCES
    max_entries = UNBOUNDED
    pinner: Pinner | None = None
    guess = Guess(operations=5e10, bytes=4e9)

    def __init__(self, device: torch.device) -> None:
        self._kernels = TorchKernels(device)
        self.copier: Copier = HostCopier()
        self._notices = Notices()

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        """See `Backend.runner`."""
        return TorchRunner(model, self._kernels, kv)

    @torch.inference_mode()
    def copy_blocks(self, kv: KvView, moves: tuple[Move, ...], lane: LaneId) -> Copied:
        """See `Backend.copy_blocks`."""
        copy_blocks(kv, moves)
        return Copied()

    def copy_out(self, runs: Sequence[Run], lane: LaneId, *, aside: bool) -> CopyWork:
        """See `Backend.copy_out`."""
        return copy_runs(runs)

    def copy_in(self, runs: Sequence[Run], lane: LaneId) -> CopyWork:
        """See `Backend.copy_in`."""
        return copy_runs(runs)

    def wait_for(self, lane: LaneId, works: Sequence[Work]) -> None:
        """See `Backend.wait_for`: there are no other lanes."""

    def check(self, spec: ModelSpec) -> None:
        """See `Backend.check`: nothing was laid out for any model."""

    def mark(self, lane: LaneId) -> Copied:
        """See `Backend.mark`."""
        return Copied()

    def expect(self, runner: Runner) -> None:
        """See `Backend.expect`: nothing is prepared."""

    def work_aside(self, seconds: float, *, urgent_only: bool) -> bool:
        """See `Backend.work_aside`."""
        return False

    @property
    def graph_usage(self) -> GraphUsage:
        """See `Backend.graph_usage`."""
        return GraphUsage(0, Bytes(0))

    @property
    def torch_bytes(self) -> Bytes:
        """See `Backend.torch_bytes`: those are none of the driver's."""
        return Bytes(0)

    def prepare(self, spec: ModelSpec) -> None:
        """See `Backend.prepare`."""
        if spec.quantization == "fp8":
            self._notices.slow_fp8("CPUs have no products of fp8")
        if spec.dtype is DType.BF16:
            self._kernels.cpu_linear.tune()

    def prepare_ahead(self, spec: ModelSpec) -> Iterator[None]:
        """See `Backend.prepare_ahead`: nothing that is worth the cores of models that serve."""
        return iter(())

    def forget(self, runner: Runner) -> None:
        """See `Backend.forget`: nothing is kept."""

    def close(self) -> None:
        """See `Backend.close`: nothing is under way."""


def copy_blocks(kv: KvView, moves: tuple[Move, ...]) -> None:
    """Copies whole blocks; no target is a source."""
    device = kv.pages.device
    sources = torch.tensor([move.source for move in moves], device=device)
    targets = torch.tensor([move.target for move in moves], device=device)
    kv.pages.index_copy_(0, targets, kv.pages.index_select(0, sources))


def copy_runs(runs: Sequence[Run]) -> Copied:
    """Memory to memory, now."""
    begin = time.perf_counter()
    for source, target, size in runs:
        ctypes.memmove(target, source, size)
    return Copied(time.perf_counter() - begin)


def cpu_device(driver: Driver, pool: SlabPool, name: str) -> Device:
    """A CPU over a given driver."""
    device = torch.device("cpu")
    return Device(driver, pool, device, name, TorchBackend(device))
