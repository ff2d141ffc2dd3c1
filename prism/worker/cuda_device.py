"""Opens an NVIDIA GPU as a device: its lanes, their memory, and what binds models to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from prism.attention.gpu.fp8 import slow_because
from prism.attention.gpu.kernels import HEAD_DIMS
from prism.attention.gpu.products import Product, Products, products_of
from prism.attention.gpu.warmup import load_kernels
from prism.attention.kernels import KvView
from prism.attention.torch_kernels import TorchKernels
from prism.config import DeviceConfig
from prism.engine.gpu.captures import DeviceCaptures
from prism.engine.gpu.flight import Event, GpuFlight
from prism.engine.gpu.graph_memory import take_graph_memory
from prism.engine.gpu.graphs import Graphs, row_numbers
from prism.engine.gpu.lane import GpuLane, LaneShape, workspace_bytes
from prism.engine.gpu.runner import GpuRunner
from prism.engine.kv_blocks import Move
from prism.engine.kv_layout import BLOCK_TOKENS, KvLayout, plan_kv_layout
from prism.engine.runner import GraphUsage, Runner
from prism.engine.step import Step
from prism.engine.torch_runner import TorchFlight, TorchRunner
from prism.errors import DeviceTooSmall, DriverError
from prism.memory.cuda import CudaDriver
from prism.memory.pool import SlabPool
from prism.memory.slabs import LaneOwner
from prism.memory.tensors import tensor_at, torch_dtype
from prism.models.decoder import Decoder
from prism.modelspec import ModelSpec
from prism.types import Bytes, DType, GiB, LaneId
from prism.weights.copiers import Copier
from prism.weights.cuda_copier import CudaCopier
from prism.weights.registrations import Pinner
from prism.worker.copies import CopyWork, Run
from prism.worker.cuda_copies import Copies, Leaving, SwapStream
from prism.worker.device import Device, Guess
from prism.worker.lanes import Work
from prism.worker.needs import ModelNeeds
from prism.worker.notices import Notices
from prism.worker.once import Once

TORCH_RESERVE = 4 * GiB
"""What torch's own allocator may take beside the pool, for the intermediate results of a step."""
UNUSUAL = "the GPU kernels are not made for fp32 or for its size of heads"
SLOTS_PER_BATCH = 4
"""Sequences of one lane that may hold blocks, in full batches: several models share it."""


def open_cuda(config: DeviceConfig, needs: ModelNeeds) -> Device:
    """A GPU with its pool; the lanes' workspaces lie in the pool's first slabs. Raises `DriverError`."""
    device = torch.device("cuda", config.index)
    driver = CudaDriver(config.index)
    torch.cuda.set_device(device)
    torch.cuda.set_per_process_memory_fraction(TORCH_RESERVE / driver.memory_info().total, device)
    shape = LaneShape(
        max_sequences=SLOTS_PER_BATCH * config.max_batch_size,
        max_blocks=-(-needs.max_context // (16 * BLOCK_TOKENS.start)) * 16,
        max_batch=config.max_batch_size,
        max_vocab=needs.max_vocab,
        max_tokens=config.max_batch_tokens,
    )
    slabs = -(-workspace_bytes(shape) // config.slab)
    num_slabs = config.memory // config.slab
    if num_slabs < config.lanes * slabs + 2:
        wanted = f"{config.lanes} lanes take {config.lanes * slabs} slabs and models at least 2"
        raise DriverError("memory", f"devices[].memory holds {num_slabs} slabs; {wanted}")
    pool = SlabPool(driver, Bytes(config.slab), num_slabs)
    lanes = [_open_lane(pool, device, LaneId(i), shape, slabs) for i in range(config.lanes)]
    backend = GpuBackend(device, lanes, Bytes(config.slab), driver)
    return Device(driver, pool, device, f"cuda:{config.index}", backend)


def _open_lane(pool: SlabPool, device: torch.device, lane: LaneId, shape: LaneShape, slabs: int) -> GpuLane:
    """Workspaces are taken first, so their slabs lie side by side."""
    taken = pool.take(LaneOwner(lane), slabs)
    assert taken == tuple(range(taken[0], taken[0] + slabs))
    memory = tensor_at(pool.address(taken[0]), (workspace_bytes(shape),), torch.uint8, None, device)
    return GpuLane(device, memory, shape)


class PlainFlight(TorchFlight):
    """A step of a `PlainRunner`."""

    def __init__(self, inner: TorchFlight, stream: torch.cuda.Stream) -> None:
        super().__init__(inner.step, inner.sampled, inner.work)
        self._stream = stream

    def launch(self, num_groups: int | None = None, seconds: float = float("inf")) -> bool:
        """See `InFlight.launch`."""
        with torch.cuda.stream(self._stream):
            has_advanced = super().launch(num_groups, seconds)
            if self.is_launched:
                self._stream.synchronize()
        return has_advanced


class PlainRunner:
    """Steps in torch operations on a lane's stream, for what the GPU kernels are not made for; they wait."""

    def __init__(self, model: Decoder, kv: KvView, lane: GpuLane) -> None:
        self.kv = kv
        self._runner = TorchRunner(model, TorchKernels(lane.device), kv)
        self._lane = lane

    def run(self, step: Step, *, is_apart: bool = False) -> PlainFlight:
        """See `Runner.run`."""
        with torch.cuda.stream(self._lane.stream):
            return PlainFlight(self._runner.run(step, is_apart=is_apart), self._lane.stream)


class GpuBackend:
    """See `Backend`."""

    guess = Guess(operations=2e14, bytes=2e10)

    def __init__(
        self, device: torch.device, lanes: list[GpuLane], slab_bytes: Bytes, driver: CudaDriver
    ) -> None:
        self.copier: Copier = CudaCopier(device)
        self.pinner: Pinner | None = driver
        self._driver = driver
        self._swap = SwapStream(driver, device)
        self._slab_bytes = slab_bytes
        self.num_lanes = len(lanes)
        self.max_sequences = lanes[0].shape.max_sequences
        self.max_entries = lanes[0].shape.max_entries
        self._device = device
        self._lanes = lanes
        self._notices = Notices()
        self._warmup_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._products_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._loaded = Once()
        """Kernels, by model and tokens in a block."""
        self._loaded_products: set[tuple[tuple[Product, ...], DType]] = set()
        self._graph_memory: Bytes | None = None
        """Taken ahead: graphs that find room there take none."""
        self._captures = DeviceCaptures(device)
        self._graphs = [Graphs(self._captures) for _ in lanes]
        for lane, graphs in zip(lanes, self._graphs, strict=True):
            self._captures.add_lane(lane, graphs)

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        """See `Backend.runner`."""
        if not is_fused(model.spec):
            return PlainRunner(model, kv, self._lanes[lane])
        return GpuRunner(model, kv, self._lanes[lane], self._graphs[lane])

    @torch.inference_mode()
    def copy_blocks(self, kv: KvView, moves: tuple[Move, ...], lane: LaneId) -> Event:
        """See `Backend.copy_blocks`."""
        with torch.cuda.stream(self._lanes[lane].stream):
            places = torch.tensor(moves, dtype=torch.int64).t().contiguous().pin_memory()
            sources, targets = places.to(self._device, non_blocking=True)
            kv.pages.index_copy_(0, targets, kv.pages.index_select(0, sources))
        return self._lanes[lane].event()

    def copy_out(self, runs: Sequence[Run], lane: LaneId, *, aside: bool) -> CopyWork:
        """See `Backend.copy_out`."""
        stream = self._lanes[lane].stream
        return self._swap.start(runs, stream) if aside else Copies(self._driver, runs, stream)

    def copy_in(self, runs: Sequence[Run], lane: LaneId) -> Copies:
        """See `Backend.copy_in`."""
        return Copies(self._driver, runs, self._lanes[lane].stream)

    def wait_for(self, lane: LaneId, works: Sequence[Work]) -> None:
        """See `Backend.wait_for`. Nothing waits on the host."""
        for work in works:
            event = work.end if isinstance(work, GpuFlight) else work
            if isinstance(event, Event | Copies | Leaving):
                event.hold(self._lanes[lane].stream)

    def mark(self, lane: LaneId) -> Event:
        """See `Backend.mark`."""
        return self._lanes[lane].event()

    def expect(self, runner: Runner) -> None:
        """See `Backend.expect`: graphs of likely sizes."""
        if isinstance(runner, GpuRunner):
            runner.expect()

    def work_aside(self, seconds: float, *, urgent_only: bool) -> bool:
        """See `Backend.work_aside`: captures."""
        return self._captures.advance(seconds, urgent_only=urgent_only)

    @property
    def graph_usage(self) -> GraphUsage:
        """See `Backend.graph_usage`."""
        usages = [graphs.usage for graphs in self._graphs]
        num_bytes = sum(u.num_bytes for u in usages) + (self._graph_memory or 0)
        return GraphUsage(sum(u.num_graphs for u in usages), Bytes(num_bytes))

    @property
    def torch_bytes(self) -> Bytes:
        """See `Backend.torch_bytes`."""
        return Bytes(torch.cuda.memory_reserved(self._device))

    def check(self, spec: ModelSpec) -> None:
        """See `Backend.check`. The lanes' tables are made when the worker starts."""
        shape = self._lanes[0].shape
        max_context = shape.max_blocks * BLOCK_TOKENS.start
        if spec.max_position > max_context or spec.vocab_size > shape.max_vocab:
            raise DeviceTooSmall(
                f"its context of {spec.max_position} tokens or its vocabulary of {spec.vocab_size} passes "
                f"what the worker was laid out for, {max_context} and {shape.max_vocab}, when the checkpoint "
                "could not be read; set max_model_len or start the server again"
            )

    def prepare(self, spec: ModelSpec) -> None:
        """See `Backend.prepare`. Compiles on the first use of a machine, loads in milliseconds later."""
        torch.cuda.set_device(self._device)  # of this thread
        if spec.quantization == "fp8":
            self._notices.slow_fp8(UNUSUAL if not is_fused(spec) else slow_because(spec))
        layout = self._fused_layout(spec)
        if layout is None:
            return
        tokens, dtype = layout.tokens_per_block, torch_dtype(spec.dtype)
        self._loaded.do((spec, tokens), partial(load_kernels, self._warmup_stream, spec, dtype, tokens))

    def prepare_ahead(self, spec: ModelSpec) -> Iterator[None]:
        """See `Backend.prepare_ahead`: products, which fine-tunes of a model share, and memory for graphs.

        Likely graphs are begun behind that: they would load the same kernels, or wait in the driver for each.
        """
        self.prepare(spec)
        yield
        products = products_of(spec)
        if self._fused_layout(spec) is None or (products, spec.dtype) in self._loaded_products:
            return
        self._loaded_products.add((products, spec.dtype))
        self._captures.begins_likely = False
        try:
            lane = self._lanes[0]
            capturing = Products(self._products_stream, lane.calls, products, torch_dtype(spec.dtype))
            yield from capturing.load(row_numbers(lane.shape.max_batch, lane.shape.max_tokens))
            if self._graph_memory is None:
                self._graph_memory = yield from take_graph_memory(capturing)
        finally:
            self._captures.begins_likely = True

    def _fused_layout(self, spec: ModelSpec) -> KvLayout | None:
        """Of the model's KV; None if the GPU kernels do not serve it, or its blocks fit no slab."""
        return plan_kv_layout(spec, self._slab_bytes) if is_fused(spec) else None

    def forget(self, runner: Runner) -> None:
        """See `Backend.forget`."""
        self._captures.forget(id(runner))
        for graphs in self._graphs:
            graphs.forget(id(runner))

    def close(self) -> None:
        """See `Backend.close`."""
        self._captures.close()


def is_fused(spec: ModelSpec) -> bool:
    """Whether the GPU kernels serve the model: not fp32, and no unusual heads."""
    return spec.dtype is not DType.F32 and spec.head_dim in HEAD_DIMS
