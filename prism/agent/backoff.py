"""When a process that ended is started again. Pure."""

from __future__ import annotations

HEALTHY_SECONDS = 2.0
FIRST_DELAY = 0.25
LONGEST_DELAY = 10.0
MOST_FAILED_STARTS = 3


class Backoff:
    """Restarts at once what had worked for a while, and ever later what keeps ending."""

    def __init__(self) -> None:
        self._num_quick_ends = 0
        self._num_failed_starts = 0
        self._has_worked = False

    def delay(self, lived: float | None) -> float:
        """Seconds to wait. `lived` is how long the process was ready, None if it never was."""
        if lived is None:
            self._num_failed_starts += 1
        else:
            self._has_worked = True
        if lived is not None and lived >= HEALTHY_SECONDS:
            self._num_quick_ends = 0
            return 0.0
        self._num_quick_ends += 1
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** (self._num_quick_ends - 1)))

    @property
    def never_starts(self) -> bool:
        """It has ended several times and was never ready: a mistake in the set-up, not an accident."""
        return not self._has_worked and self._num_failed_starts >= MOST_FAILED_STARTS
