"""A device: its driver, its pool of slabs and its lane's kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from prism.attention.kernels import Kernels, KvView
from prism.engine.kv_blocks import Move
from prism.engine.kv_layout import KvLayout
from prism.memory.arena import Arena
from prism.memory.driver import Driver
from prism.memory.pool import SlabPool
from prism.memory.slabs import LaneOwner
from prism.memory.tensors import tensor_at, torch_dtype
from prism.modelspec import ModelSpec
from prism.types import Address, Bytes, LaneId, Stamp
from prism.weights.copiers import Copier
from prism.weights.registrations import Pinner
from prism.weights.views import view_weights
from prism.worker.models import Profile


@dataclass(slots=True)
class Lane:
    """Counts the steps that were queued on the device and those that have run."""

    lane_id: LaneId
    num_queued: int = 0
    num_completed: int = 0

    def stamp(self) -> Stamp:
        """Names the last step that has been queued."""
        return Stamp(self.lane_id, self.num_queued)


class Device:
    """Everything of one device that models share."""

    def __init__(
        self,
        driver: Driver,
        pool: SlabPool,
        device: torch.device,
        name: str,
        kernels: Callable[[ModelSpec], Kernels],
        synchronize: Callable[[], None],
        prepare: Callable[[ModelSpec], None],
        copier: Copier,
        pinner: Pinner | None = None,
    ) -> None:
        """What kinds of devices differ in.

        `kernels` gives a model's kernels; `synchronize` returns once all queued work has run; `prepare`,
        which runs beside the loop, has the kernels of a model built and loaded; `copier` brings weights in;
        `pinner` registers host memory where copies are faster from there.
        """
        self.driver = driver
        self.pool = pool
        self.device = device
        self.name = name
        self.kernels_for = kernels
        self.lane = Lane(LaneId(0))
        self.prepare = prepare
        self.copier = copier
        self.pinner = pinner
        self._synchronize = synchronize
        self._side_stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def slab_bytes(self) -> Bytes:
        """Size of one slab."""
        return self.pool.slab_bytes

    @property
    def num_slabs(self) -> int:
        """Slabs that models can have: all but the lane's workspace."""
        return self.pool.num_slabs - len(self.pool.owned(LaneOwner(self.lane.lane_id)))

    def new_arena(self, size: Bytes) -> Arena:
        """Addresses for one model's weights; no memory yet."""
        return Arena(self.driver, size, self.slab_bytes)

    def kv_view(self, spec: ModelSpec, layout: KvLayout) -> KvView:
        """The whole window in pages of one model."""
        dtype = torch_dtype(spec.dtype)
        size = spec.dtype.itemsize
        row = spec.num_kv_heads * spec.head_dim
        tokens = layout.tokens_per_block
        num_pages = (self.pool.window_bytes - layout.block_bytes) // layout.unit + 1
        pages = tensor_at(
            self.pool.window,
            (num_pages, spec.num_layers, 2, tokens, spec.num_kv_heads, spec.head_dim),
            dtype,
            (layout.unit // size, 2 * tokens * row, tokens * row, row, spec.head_dim, 1),
            self.device,
        )
        return KvView(pages)

    def beside_steps(self) -> AbstractContextManager[object]:
        """What a load's thread queues in this context neither waits for the lane's steps nor delays them."""
        return nullcontext() if self._side_stream is None else torch.cuda.stream(self._side_stream)

    def weight_tensors(self, profile: Profile, arena: Arena) -> dict[str, Tensor]:
        """Views of all weights by name; nothing is touched."""
        return view_weights(profile.weights, arena.base, self.device)

    def rotary_tensor(self, profile: Profile, arena: Arena) -> Tensor:
        """`[max_position, head_dim]` fp32 behind the weights."""
        spec = profile.spec
        return tensor_at(
            Address(arena.base + profile.rotary_offset),
            (spec.max_position, spec.head_dim),
            torch.float32,
            None,
            self.device,
        )

    @torch.inference_mode()
    def copy_blocks(self, view: KvView, moves: tuple[Move, ...]) -> None:
        """Copy blocks within a model's KV, behind the steps that are queued."""
        if moves:
            device = self.device
            sources = torch.tensor([move.source for move in moves], device=device)
            targets = torch.tensor([move.target for move in moves], device=device)
            view.pages.index_copy_(0, targets, view.pages.index_select(0, sources))

    def begin_step(self) -> None:
        """A step (or a copy) is about to be queued."""
        self.lane.num_queued += 1

    def end_step(self) -> None:
        """Wait for all queued steps: what they could touch may change its owner."""
        self._synchronize()
        self.lane.num_completed = self.lane.num_queued
        self.pool.completed(self.lane.lane_id, self.lane.num_completed)

    def close(self) -> None:
        """Give all memory back."""
        for slab in self.pool.owned(LaneOwner(self.lane.lane_id)):
            self.pool.give_back(LaneOwner(self.lane.lane_id), (slab,))
        self.pool.close()
        self.driver.close()
