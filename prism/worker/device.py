"""A device: its driver, its pool of slabs and its lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from prism.attention.kernels import KvView
from prism.costs import DeviceRates
from prism.engine.kv_blocks import Move
from prism.engine.kv_layout import KvLayout
from prism.engine.runner import GraphUsage, Runner
from prism.engine.scheduler import Slots
from prism.engine.step import Step
from prism.memory.arena import Arena
from prism.memory.driver import Driver
from prism.memory.ledger import Ledger
from prism.memory.pool import SlabPool
from prism.memory.slabs import LaneOwner
from prism.memory.tensors import tensor_at, torch_dtype
from prism.models.decoder import Decoder
from prism.models.rotary import rotary_frequencies, write_rotary_table
from prism.modelspec import ModelSpec
from prism.types import Address, Bytes, LaneId, ModelId, Seconds
from prism.weights.copiers import Copier
from prism.weights.registrations import Pinner
from prism.weights.views import view_weights
from prism.worker.copies import CopyWork, Run
from prism.worker.lanes import Deferred, Flight, Lane, Work
from prism.worker.models import Profile


@dataclass(frozen=True, slots=True)
class Guess:
    """Speeds of a kind of device before anything has been measured."""

    operations: float
    """Floating-point operations a second of a prompt."""
    bytes: float
    """Bytes a second between device and host memory, each way."""


class Backend(Protocol):
    """What kinds of devices differ in."""

    num_lanes: int
    max_sequences: int
    """Sequences that can hold blocks at a time on one lane."""
    max_entries: int
    """Blocks that one step may enter into its lane's tables."""
    copier: Copier
    """Brings weights in."""
    pinner: Pinner | None
    """Registers host memory, where copies are faster from there."""
    guess: Guess
    """Speeds before they are measured."""

    def runner(self, model: Decoder, kv: KvView, lane: LaneId) -> Runner:
        """Binds a model to a lane."""
        ...

    def copy_blocks(self, kv: KvView, moves: tuple[Move, ...], lane: LaneId) -> Work:
        """Copy blocks within a model's KV, behind the lane's queued steps."""
        ...

    def copy_out(self, runs: Sequence[Run], lane: LaneId, *, aside: bool) -> CopyWork:
        """Copy from the window to host memory, behind what is queued on the lane.

        What is queued on the lane later runs behind these copies, too, unless they are made `aside`: then
        only what waits for them does.
        """
        ...

    def copy_in(self, runs: Sequence[Run], lane: LaneId) -> CopyWork:
        """Copy from host memory to the window, in the order of the lane."""
        ...

    def wait_for(self, lane: LaneId, works: Sequence[Work]) -> None:
        """Let what is queued on the lane from now on run behind these works of other lanes.

        All of them have been launched.
        """
        ...

    def mark(self, lane: LaneId) -> Work:
        """Done once all has run that is queued on the lane now."""
        ...

    def expect(self, runner: Runner) -> None:
        """Its first step is near: `work_aside` may prepare what its steps gain by."""
        ...

    def work_aside(self, seconds: float, *, urgent_only: bool) -> bool:
        """Go on with what steps gain by, about so long; whether there was anything to do.

        Called by the loop between steps. With `urgent_only` others wait for the loop.
        """
        ...

    @property
    def graph_usage(self) -> GraphUsage:
        """Memory beside the pool that captured steps take."""
        ...

    @property
    def torch_bytes(self) -> Bytes:
        """Memory beside the pool that torch's allocator holds, intermediate results of graphs included."""
        ...

    def check(self, spec: ModelSpec) -> None:
        """Raises `DeviceTooSmall` if the device, as it was laid out, cannot serve the model."""
        ...

    def prepare(self, spec: ModelSpec) -> None:
        """Have what the model's steps need built and loaded. Runs beside the loop."""
        ...

    def prepare_ahead(self, spec: ModelSpec) -> Iterator[None]:
        """The same for all that any of its steps may need, in pieces. Runs beside the loop, while there is
        time: what it has not come to is loaded by the steps. Raises `DriverError`.
        """
        ...

    def forget(self, runner: Runner) -> None:
        """A model is gone for good, and what was kept for its return with it."""
        ...

    def close(self) -> None:
        """Nothing is prepared any more: while a capture is left alone, nobody can wait for all of a GPU."""
        ...


class Device:
    """Everything of one device that models share."""

    def __init__(
        self, driver: Driver, pool: SlabPool, device: torch.device, name: str, backend: Backend
    ) -> None:
        self.driver = driver
        self.pool = pool
        self.device = device
        self.name = name
        self._side_stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.backend = backend
        guess = backend.guess
        self.rates = DeviceRates(guess.operations, guess.bytes, guess.bytes, Seconds(2e-5))
        """What it can do: a guess, unless whoever opens it measures."""
        self.lanes = tuple(
            Lane(LaneId(i), Slots(backend.max_sequences, backend.max_entries))
            for i in range(backend.num_lanes)
        )
        self.swap = Lane(LaneId(backend.num_lanes), Slots(0))
        """Not for steps: copies of KV that leaves the device, so that stamps can name them."""
        self.all_lanes = (*self.lanes, self.swap)

    def bind(self) -> Lane:
        """The lane with the fewest models gets one more."""
        lane = min(self.lanes, key=lambda lane: (lane.num_models, lane.lane_id))
        lane.num_models += 1
        return lane

    def move_blocks(self, model: ModelId, kv: KvView, moves: tuple[Move, ...], lane: Lane) -> None:
        """Queue copies of blocks within a model's KV, behind all steps that the lane has."""
        if not moves:
            return
        copy = partial(self.backend.copy_blocks, kv, moves, lane.lane_id)
        lane.queue(model, copy() if lane.launching is None else Deferred(copy))

    def neighbours(self, lane: Lane, step: Step) -> tuple[Flight, ...]:
        """What a step runs behind: one with prompts shares the device with no other.

        Decodes of several lanes run side by side. Beside a prompt, each of a decode's many small kernels
        would wait until the large ones leave room.
        """
        others = [flight for other in self.lanes if other is not lane for flight in other.flights]
        return tuple(others if step.has_prompts else [flight for flight in others if flight.has_prompts])

    def take_turns(self, lane: Lane, flight: Flight) -> None:
        """Let a flight that may be launched, and all behind it on the lane, run behind what it has to."""
        works = [other.queued for other in flight.after if not other.has_run]
        if works and not flight.is_in_turn:
            self.backend.wait_for(lane.lane_id, works)
        flight.is_in_turn = True

    def settle(self, lane: Lane) -> None:
        """Take note of copies that have run, as far as no step stands before them."""
        while lane.flights and lane.flights[0].step is None and lane.flights[0].work.is_done():
            flight = lane.flights.popleft()
            flight.has_run = True
            lane.num_completed = flight.number
        self.pool.completed(lane.lane_id, lane.num_completed)

    @property
    def slab_bytes(self) -> Bytes:
        """Size of one slab."""
        return self.pool.slab_bytes

    @property
    def num_slabs(self) -> int:
        """Slabs that models can have: all but the lanes' workspaces."""
        held = sum(len(self.pool.owned(LaneOwner(lane.lane_id))) for lane in self.lanes)
        return self.pool.num_slabs - held

    def ledger(self) -> Ledger:
        """All memory that is counted: the pool's, graphs', torch's."""
        return self.pool.ledger(self.backend.graph_usage.num_bytes, {"torch": self.backend.torch_bytes})

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

    def write_rotary(self, profile: Profile, arena: Arena) -> None:
        """Fill `rotary_tensor`; it is there when this returns. For a load's thread.

        It neither waits for the lanes' steps nor delays them. Nothing is copied, not even the frequencies,
        which the device reads in pinned memory: a copy would wait behind all weights that are on their way.
        """
        table = self.rotary_tensor(profile, arena)
        frequencies = rotary_frequencies(profile.spec.rope, profile.spec.head_dim)
        if self._side_stream is None:
            write_rotary_table(frequencies, table)
            return
        frequencies = frequencies.pin_memory()
        place = Address(frequencies.data_ptr())
        with torch.cuda.stream(self._side_stream):
            seen = tensor_at(place, tuple(frequencies.shape), torch.float32, None, self.device)
            write_rotary_table(seen * 1.0, table)
        self._side_stream.synchronize()

    def close(self) -> None:
        """Give all memory back."""
        self.backend.close()
        for lane in self.lanes:
            owner = LaneOwner(lane.lane_id)
            self.pool.give_back(owner, self.pool.owned(owner))
        self.pool.close()
        self.driver.close()
