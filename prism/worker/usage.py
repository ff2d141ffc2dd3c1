"""What each model has asked of its device since the worker started. The controller makes rates of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Usage:
    """Counters of one model; they only grow."""

    num_requests: int = 0
    """That started."""
    prompt_tokens: int = 0
    """Theirs, what the prefix cache had included."""
    decoded_tokens: int = 0
    device_seconds: float = 0.0


class DeviceTime:
    """Splits the device's time among the models whose steps end.

    A step gets the time since it was queued, or since another one ended on whichever lane, if later.
    So the parts of steps that run side by side add up to the time that has passed, and the shares of all
    models of a device to 1 at most.
    """

    def __init__(self) -> None:
        self._last_end = 0.0

    def ended(self, begin: float, now: float) -> float:
        """The part of a step that was queued at `begin` and has run `now`."""
        seconds = max(0.0, now - max(begin, self._last_end))
        self._last_end = now
        return seconds
