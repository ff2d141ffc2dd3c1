"""One model's weights on their way to the device: what is copied next, what has arrived, how it ends."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from prism.errors import CheckpointError
from prism.types import Address, Bytes
from prism.weights.checksum import CHUNK_BYTES
from prism.weights.client import PackedWeights
from prism.weights.copiers import Piece
from prism.weights.places import Places
from prism.weights.registrations import NOTHING, Registered

NEVER = float("inf")
"""The deadline of what nobody waits for."""


class Transfer:
    """Packed weights and the slabs that they go to.

    `arrived` and `deadline` may be read and `deadline` written by any thread; `arrived` only grows. All else
    belongs to the link from `Link.start` until `has_ended` is set.
    """

    def __init__(
        self, packed: PackedWeights, places: Places, registered: Registered = NOTHING, deadline: float = NEVER
    ) -> None:
        """What `registered` covers is copied from there; the rest through pinned memory, where it matters."""
        assert len(places.slabs) * places.slab_bytes >= packed.total_bytes, "the slabs are too few"
        self.total = packed.total_bytes
        self.deadline = deadline
        """When it is due; the earliest goes first."""
        self.arrived = Bytes(0)
        """Bytes from the beginning that are on the device; their checksums may still be wrong."""
        self.has_ended = threading.Event()
        """Nothing reads the packed weights or writes to the slabs any more, and `error` says how it went."""
        self.error: Exception | None = None
        self.is_cancelled = False
        self.last_turn = 0
        self._packed = packed
        self.places = places
        self._registered = registered
        self._queued = Bytes(0)

    @property
    def is_copying(self) -> bool:
        """Whether there is anything to queue."""
        return self._queued < self.total and not self.is_cancelled and self.error is None

    @property
    def has_arrived(self) -> bool:
        """Whether all of it is on the device."""
        return self.arrived == self.total

    def cancel(self) -> None:
        """Have it end soon, between two pieces. From any thread."""
        self.is_cancelled = True

    def abandon(self) -> None:
        """It has not been started, and never will be."""
        self.is_cancelled = True
        self.has_ended.set()

    def take_piece(self, chunk_bytes: Bytes) -> Piece:
        """The next piece: no larger than this, and in one slab."""
        places, begin = self.places, self._queued
        size = Bytes(min(chunk_bytes, places.slab_bytes, self.total - begin))
        slab, offset = divmod(begin, places.slab_bytes)
        self._queued = Bytes(begin + size)
        is_registered = self._queued <= self._registered.size
        base = self._registered.address if is_registered else self._packed.address
        target = Address(places.slabs[slab] + offset)
        return Piece(Address(base + begin), is_registered, begin, size, target)

    def verify(self, arrived: NDArray[np.uint64]) -> None:
        """Raises `CheckpointError` when the bytes on the device are not those that were packed."""
        wrong = np.flatnonzero(arrived != self._packed.checksums)
        if len(wrong):
            problem = f"{len(wrong)} of {len(arrived)} chunks arrived damaged, the first at byte"
            raise CheckpointError(f"{problem} {wrong[0] * CHUNK_BYTES}", file=f"packed {self._packed.model}")
