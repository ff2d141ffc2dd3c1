"""What bounds the harm of a dying worker: the rate of resubmissions and the quarantine of models; pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from prism.types import ModelId

QUARANTINE_KILLS = 3
QUARANTINE_WINDOW = 600.0
QUARANTINE_SECONDS = 60.0
QUARANTINE_LONGEST = 960.0
RESUBMIT_BURST = 64
RESUBMIT_RATE = 200.0
"""Resubmissions per second after the burst: a worker that comes back is not flooded with all it had."""

_BATCH = 8


class TokenBucket:
    """Lets `burst` things through at once and `rate` per second in the long run."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._level = burst
        self._time: float | None = None

    def take(self, now: float) -> bool:
        """One may pass."""
        self._fill(now)
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def next_time(self, now: float) -> float:
        """When several may pass: those who wait need not be looked through for each single one."""
        self._fill(now)
        missing = max(0.0, min(self._burst, _BATCH) - self._level)
        return now + missing / self._rate

    def _fill(self, now: float) -> None:
        passed = 0.0 if self._time is None else max(0.0, now - self._time)
        self._level = min(self._burst, self._level + passed * self._rate)
        self._time = now


@dataclass(slots=True)
class _Record:
    kills: deque[float] = field(default_factory=deque)
    until: float = 0.0
    num_times: int = 0


class Quarantine:
    """Models whose requests killed a worker while nothing ran beside them, again and again.

    Three such deaths within ten minutes close a model for a minute; the time doubles with each repetition
    up to 16 minutes, and an hour in freedom resets it.
    """

    def __init__(self) -> None:
        self._records: dict[ModelId, _Record] = {}

    def killed(self, model: ModelId, now: float) -> bool:
        """A request of the model killed a worker while it ran alone; True if that closes the model."""
        record = self._records.setdefault(model, _Record())
        record.kills.append(now)
        while record.kills[0] <= now - QUARANTINE_WINDOW:
            record.kills.popleft()
        if len(record.kills) < QUARANTINE_KILLS:
            return False
        record.num_times = 1 if now - record.until > 3600 else record.num_times + 1
        seconds = QUARANTINE_SECONDS * 2 ** (record.num_times - 1)
        record.until = now + min(seconds, QUARANTINE_LONGEST)
        record.kills.clear()
        return True

    def seconds_left(self, model: ModelId, now: float) -> float:
        """How long the model stays closed; 0 if it is not."""
        record = self._records.get(model)
        return 0.0 if record is None else max(0.0, record.until - now)


class Throughput:
    """Endings per second over the last half minute, for an honest Retry-After."""

    WINDOW = 30.0
    SHORTEST, LONGEST = 1.0, 60.0

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=4096)

    def ended(self, now: float) -> None:
        """One more request is done."""
        self._ends.append(now)

    def retry_after(self, num_ahead: int, now: float) -> float:
        """Seconds until `num_ahead` requests will have ended at the present rate."""
        recent = sum(end > now - self.WINDOW for end in self._ends)
        if recent == 0:
            return self.LONGEST if num_ahead else self.SHORTEST
        return min(self.LONGEST, max(self.SHORTEST, num_ahead * self.WINDOW / recent))
