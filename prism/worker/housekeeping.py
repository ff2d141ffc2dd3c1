"""What takes a while and may wait: a worker does it once nothing has been asked of it for a moment."""

from __future__ import annotations

from collections.abc import Callable

from prism.worker import garbage

QUIET_SECONDS = 1.0
"""Between requests of one conversation, say, is no time for it: the next one would wait."""
CHECK_SECONDS = 10.0
CHECK_SHARE = 0.001
"""The books are checked every `CHECK_SECONDS`, or so rarely that checks take this share of the time: with
250,000 KV blocks one takes 0.14 s."""


class Housekeeping:
    """Checks of the books, and garbage."""

    def __init__(self, check: Callable[[], None], clock: Callable[[], float]) -> None:
        self._check = check
        self._clock = clock
        self._quiet_since: float | None = None
        self._check_due = 0.0

    def busy(self) -> None:
        """Something runs, or somebody waits."""
        self._quiet_since = None

    def idle(self) -> None:
        """Nothing does, and nobody."""
        now = self._clock()
        if self._quiet_since is None:
            self._quiet_since = now
        if now < self._quiet_since + QUIET_SECONDS:
            return
        garbage.while_idle()
        if now >= self._check_due:
            begin = self._clock()
            self._check()
            self._check_due = now + max(CHECK_SECONDS, (self._clock() - begin) / CHECK_SHARE)
