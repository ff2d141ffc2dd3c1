"""The least of many keys that come and go, without looking at all of them."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

KeyT = TypeVar("KeyT", bound=tuple[Any, ...])

SPARE = 16
"""Keys that have gone and are still in the heap, beside as many as there are."""


class Earliest(Generic[KeyT]):
    """Each operation takes O(log n), over time."""

    def __init__(self) -> None:
        self._heap: list[KeyT] = []
        self._keys: set[KeyT] = set()

    def add(self, key: KeyT) -> None:
        """One more; no two are equal."""
        self._keys.add(key)
        heappush(self._heap, key)

    def remove(self, key: KeyT) -> None:
        """One less. It leaves the heap when it has become the least, or with many others."""
        self._keys.remove(key)
        if len(self._heap) > 2 * len(self._keys) + SPARE:
            self._heap = sorted(self._keys)

    @property
    def least(self) -> KeyT | None:
        """None without any."""
        while self._heap and self._heap[0] not in self._keys:
            heappop(self._heap)
        return self._heap[0] if self._heap else None
