"""When a process that ended is started again. Pure."""

from __future__ import annotations

HEALTHY_SECONDS = 2.0
FIRST_DELAY = 0.25
LONGEST_DELAY = 10.0
MOST_FAILED_STARTS = 3


class Backoff:
    """Restarts at once what had worked for a while, and ever later what keeps failing."""

    def __init__(self) -> None:
        self._num_quick_ends = 0
        self._num_failed_starts = 0

    def delay(self, lived: float | None) -> float:
        """Seconds to wait. `lived` is how long the process was ready, None if it never was."""
        if lived is None:
            self._num_failed_starts += 1
        else:
            self._num_failed_starts = 0
        if lived is not None and lived >= HEALTHY_SECONDS:
            self._num_quick_ends = 0
            return 0.0
        self._num_quick_ends += 1
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._num_quick_ends - 1)))

    @property
    def never_starts(self) -> bool:
        """It has ended several times in a row without having become ready."""
        return self._num_failed_starts >= MOST_FAILED_STARTS
