"""How fast requests complete, for honest Retry-After headers."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 30.0
LEAST_SECONDS = 1.0
MOST_SECONDS = 60.0


class CompletionRate:
    """Completions within a sliding window."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=4096)

    def completed(self, now: float) -> None:
        """One more request has ended well."""
        self._times.append(now)

    def seconds_for(self, count: int, now: float) -> float:
        """Time in which `count` requests complete at the recent rate, between 1 and 60 s."""
        while self._times and self._times[0] < now - WINDOW_SECONDS:
            self._times.popleft()
        if not self._times:
            return LEAST_SECONDS * 5
        span = max(now - self._times[0], 1.0)
        return min(MOST_SECONDS, max(LEAST_SECONDS, count * span / len(self._times)))
