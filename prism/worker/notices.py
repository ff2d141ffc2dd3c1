"""What a device says once in the log, however often it is so."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class Notices:
    """Of one device. For any thread: at worst something is said twice."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def slow_fp8(self, reason: str | None) -> None:
        """Quantised weights save memory here, but no time. Without a reason nothing is said."""
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            log.warning(
                "quantization fp8: weights are written out for each product, which is slow: %s", reason
            )
