"""What each model has asked of its device since the worker started. The controller makes rates of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism.messages import WAITS

HOPE = 2.0
"""Times that a prompt takes alone which an objective must allow, that a late first token tells of the device:
it mostly waits for the end of a step, whatever else is asked."""


def needed(seconds: float, gap: float, tpot: float) -> float:
    """The part of a decode step's time that the objective of its streams asks for.

    They need one step every `tpot`. One that ends `gap` after the model's step before it, sooner than that,
    counts by so much less: what stays is the share of the device that the streams would take at the pace that
    they were promised. Of several streams the tightest objective counts, since the others share its steps.
    """
    return seconds if gap >= tpot else seconds * gap / tpot


def is_hopeful(alone: float, ttft: float) -> bool:
    """Whether a first token could well be in time whose prompt takes so many seconds alone."""
    return HOPE * alone <= ttft


@dataclass(slots=True)
class Usage:
    """Counters of one model; they only grow."""

    num_requests: int = 0
    """That started."""
    prompt_tokens: int = 0
    """Theirs, what the prefix cache had included."""
    decoded_tokens: int = 0
    num_late: int = 0
    """First tokens that came late, or never, of requests that found the model here and were hopeful."""
    device_seconds: float = 0.0
    needed_seconds: float = 0.0
    """What of them the objectives asked for: decode steps by `needed`, all else in full."""
    blocked_seconds: list[float] = field(default_factory=lambda: [0.0] * len(WAITS))
    """For each of `WAITS`, how long who came had to wait longer than that for the end of a step."""
    _last_end: float = 0.0

    def ran(self, share: float, length: float, end: float, tpot: float | None) -> None:
        """A step has run: its part of the device's time, how long it took, and its streams' objective.

        None says that all of it is needed: it had prompts, or requests of its model wait for what its streams
        hold. A step whose streams have all been cancelled has an infinite one.
        """
        self.device_seconds += share
        self.needed_seconds += share if tpot is None else needed(share, end - self._last_end, tpot)
        self._last_end = end
        for place, wait in enumerate(WAITS):
            if length <= wait:
                break
            self.blocked_seconds[place] += length - wait


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
