"""Notices a device that stands still although requests have been admitted. Pure.

It never should. But whoever waits for memory, for a load or for a turn waits for somebody else, and a mistake
in who waits for whom would last until a request's longest life is over. So a standstill is looked for, told
in the log with the state that led to it, and ended.
"""

from __future__ import annotations

from collections.abc import Hashable

STANDSTILL_SECONDS = 10.0
"""With nothing queued on the device and nothing on its way; who lacks memory looks again each two seconds."""


class Standstill:
    """The time since anything has changed."""

    def __init__(self) -> None:
        self._mark: Hashable = None
        self._since = 0.0

    def ended(self, now: float) -> None:
        """Something moves, though the next look may find all as it was: a prompt takes many steps."""
        self._mark, self._since = None, now

    def lasts(self, mark: Hashable, now: float) -> bool:
        """Whether `mark`, which changes with all that happens, has been the same for so long; then afresh."""
        if mark != self._mark:
            self._mark, self._since = mark, now
        if now - self._since < STANDSTILL_SECONDS:
            return False
        self._since = now
        return True
