"""Times at which a process's loop stood still: counted, and told in the log with what is known of the cause.

Whoever waits for a token meanwhile gets it late, and no other figure says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import thread_time
from typing import NamedTuple

log = logging.getLogger(__name__)

STALL_SECONDS = 0.25
"""Shorter ones are not looked at: a stream shows about one such gap to its reader."""
TELL_SECONDS = 10.0
"""From one line of the log to the next."""


class _Stall(NamedTuple):
    """For `core_seconds` of the last `past_seconds`, up to its end, the loop's thread had a core."""

    seconds: float
    cause: str
    core_seconds: float
    past_seconds: float


class Stalls:
    """Those of one loop. Its thread calls `tell` every now and then, whether there were any or not."""

    def __init__(self, process: str, core_time: Callable[[], float] = thread_time) -> None:
        self._process = process
        self.num_stalls = 0
        self.seconds = 0.0
        self._core_time = core_time
        self._looked: tuple[float, float] | None = None
        """When `tell` was called, and how long the thread had had a core by then."""
        self._num_untold = 0
        self._longest: _Stall | None = None
        """Of those that have not been told."""
        self._told = -TELL_SECONDS

    def note(self, seconds: float, cause: str, now: float) -> None:
        """One has just ended. `cause` is a text for people."""
        self.num_stalls += 1
        self.seconds += seconds
        self._num_untold += 1
        if self._longest is None or seconds > self._longest.seconds:
            core_time = self._core_time()
            since, core_before = self._looked or (now, core_time)
            self._longest = _Stall(seconds, cause, core_time - core_before, now - since)

    def tell(self, now: float) -> None:
        """Log the longest of those that have not been told, if the last line is long enough ago."""
        longest = self._longest
        if longest is not None and now >= self._told + TELL_SECONDS:
            log.warning(
                "%s stood still for up to %.2f s (%s; its loop had a core for %.2f of the last %.2f s); "
                "times since the last such line: %d",
                *(self._process, *longest, self._num_untold),
            )
            self._told, self._num_untold, self._longest = now, 0, None
        self._looked = now, self._core_time()
