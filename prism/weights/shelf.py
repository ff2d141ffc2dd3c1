"""What the store holds: packed weights, least recently used first, who has borrowed them, and the room left.

Two kinds of loans. A load's is firm: the memory is not taken while it lasts. A cached one is for convenience
(registered with CUDA ahead of time): the store may recall it, and waits until it has come back.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from prism.memory.available import available_memory
from prism.types import Bytes, ModelId
from prism.weights.protocol import Manifest

Recall = Callable[[], None]
"""Asks a borrower to give a cached loan back; does not wait."""


@dataclass(slots=True)
class _Held:
    """A packed model."""

    manifest: Manifest
    fd: int
    size: Bytes
    num_firm: int = 0
    num_cached: int = 0
    recalls: list[Recall] = field(default_factory=list)
    """Of cached loans that have not been recalled yet."""


class Shelf:
    """Packed models within a budget. Nothing here waits."""

    def __init__(self, budget: Bytes) -> None:
        self.budget = budget
        self.used = 0  # bytes of files held or being packed
        self.unreserved = 0  # those of them whose pages a packer has yet to take
        self._held: OrderedDict[ModelId, _Held] = OrderedDict()  # least recently used first

    def __contains__(self, model: ModelId) -> bool:
        return model in self._held

    def models(self) -> dict[ModelId, Bytes]:
        """All that is held, with the bytes of its weights."""
        return {model: Bytes(held.manifest.total_bytes) for model, held in self._held.items()}

    def put(self, manifest: Manifest, fd: int, size: Bytes, *, is_used: bool) -> None:
        """Hold a packed model. What nobody has used is evicted before all else, the last such one first."""
        model = ModelId(manifest.model)
        self._held[model] = _Held(manifest, fd, size)
        if not is_used:
            self._held.move_to_end(model, last=False)

    def touch(self, model: ModelId) -> Bytes:
        """The model is used; returns the bytes of its weights."""
        self._held.move_to_end(model)
        return Bytes(self._held[model].manifest.total_bytes)

    def drop(self, model: ModelId) -> None:
        """Give a model's memory back to the system."""
        held = self._held.pop(model)
        os.close(held.fd)
        self.used -= held.size

    # --- loans -------------------------------------------------------------------------------------

    def lend(self, model: ModelId, recall: Recall | None) -> tuple[Manifest, int] | None:
        """Manifest and descriptor of a model, None if not held; a cached loan comes with its `recall`."""
        held = self._held.get(model)
        if held is None:
            return None
        if recall is None:
            held.num_firm += 1
            self._held.move_to_end(model)
        else:
            held.num_cached += 1
            held.recalls.append(recall)
        return held.manifest, held.fd

    def take_back(self, model: ModelId, recall: Recall | None) -> None:
        """A loan has ended."""
        held = self._held.get(model)
        if held is None:
            return
        if recall is None:
            held.num_firm -= 1
            return
        held.num_cached -= 1
        if recall in held.recalls:
            held.recalls.remove(recall)

    # --- room --------------------------------------------------------------------------------------

    def room(self) -> int:
        """Bytes that can be taken as things are."""
        return min(self.budget - self.used, available_memory() - self.unreserved)

    def ample_room(self) -> int:
        """Bytes for what nobody has asked for: the machine keeps half of what it has left."""
        return min(self.budget - self.used, (available_memory() - self.unreserved) // 2)

    def reachable(self) -> int:
        """Bytes that could be taken if all that is not firmly lent were evicted."""
        return self.room() + sum(self._held[model].size for model in self._idle())

    def is_in_use(self) -> bool:
        """Whether anything may come out of use: packed models that are lent, or others being packed."""
        return self.used > sum(self._held[model].size for model in self._idle())

    def evict_for(self, size: Bytes) -> bool:
        """Evict, least recently used first, until `size` bytes are free; False while loans are recalled."""
        coming = 0
        for model in self._idle():
            if size <= self.room() + coming:
                break
            held = self._held[model]
            if held.num_cached:
                recalls, held.recalls = held.recalls, []
                for recall in recalls:
                    recall()
                coming += held.size
            else:
                self.drop(model)
        return size <= self.room()

    def _idle(self) -> list[ModelId]:
        return [model for model, held in self._held.items() if not held.num_firm]
