"""Time: one clock for all processes of a machine, and one that tests move by hand.

Times that travel between processes (`arrival`, `latest_end`) are Unix times. `SystemClock` reads the
calendar once and then follows the monotonic clock, so that a corrected calendar never makes a wait
negative or a deadline jump.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and waits for it."""

    def now(self) -> float:
        """Unix time in seconds; never goes back."""
        ...

    async def wait(self, event: asyncio.Event, until: float | None) -> None:
        """Return when `event` is set, or at `until`."""
        ...


class SystemClock:
    """The real one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Unix time as of start plus the seconds since."""
        return self._offset + time.monotonic()

    async def wait(self, event: asyncio.Event, until: float | None) -> None:
        """Return when `event` is set, or at `until`."""
        timeout = None if until is None else max(0.0, until - self.now())
        try:
            await asyncio.wait_for(event.wait(), timeout)
        except TimeoutError:
            return


class ManualClock:
    """Stands still until `advance` is called."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self._now = now
        self._sleepers: dict[asyncio.Event, float] = {}

    def now(self) -> float:
        """The time that was last set."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move on; those whose time has come wake, and nobody else."""
        assert seconds >= 0
        self._now += seconds
        for event, until in self._sleepers.items():
            if until <= self._now:
                event.set()

    async def wait(self, event: asyncio.Event, until: float | None) -> None:
        """Return when `event` is set, or at once if `until` is over."""
        if until is not None and until <= self._now:
            return
        self._sleepers[event] = math.inf if until is None else until
        try:
            await event.wait()
        finally:
            del self._sleepers[event]
