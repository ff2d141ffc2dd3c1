"""Which request must be looked at when; pure."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

from prism.types import RequestId

_SLACK = 1024


class Timers:
    """Times of requests. One that has ended keeps its times until they pass or `forget` drops them."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, RequestId]] = []

    def set(self, time: float, request_id: RequestId) -> None:
        """Look at the request then, too."""
        heapq.heappush(self._heap, (time, request_id))

    def due(self, now: float) -> Iterator[RequestId]:
        """Whose time has come; each time is told once."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]

    def next_time(self) -> float | None:
        """When the next one is due."""
        return self._heap[0][0] if self._heap else None

    def forget(self, live: Container[RequestId], num_live: int) -> None:
        """Drop the times of requests that have ended, once most are such."""
        if len(self._heap) > 4 * num_live + _SLACK:
            self._heap = sorted(timer for timer in self._heap if timer[1] in live)
