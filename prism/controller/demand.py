"""What was asked of each model within a sliding window, from counters in the workers' reports. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from prism.messages import ModelReport, Report
from prism.types import ModelId, WorkerId

BUCKET = 1.0
"""Seconds that are kept as one sum."""
LEAST_SHARE = 1 / 3
"""Share of the window that must have been seen before rates are what was seen; they grow until then."""


@dataclass(frozen=True, slots=True)
class Load:
    """Rates of one model, over all of its workers."""

    token_rate: float = 0.0
    compute: float = 0.0
    """Seconds a second of a device of speed 1."""
    noise: float = 1.0
    """Relative standard deviation: requests come at random, so it is one over the root of how many were seen,
    those that began in the window and those that ran when it began."""


@dataclass(slots=True)
class _Bucket:
    begin: float
    num_running: int
    """Requests that ran when it began."""
    num_tokens: float = 0.0
    seconds: float = 0.0
    num_requests: int = 0


@dataclass(frozen=True, slots=True)
class _Counters:
    incarnation: int
    num_tokens: int
    seconds: float
    num_requests: int
    num_running: int


class DemandWindow:
    """Differences between reports; a worker's first report is where its counting begins."""

    def __init__(self, window: float, speeds: dict[WorkerId, float]) -> None:
        self._window = window
        self._speeds = speeds
        self._since: float | None = None
        self._last: dict[tuple[WorkerId, ModelId], _Counters] = {}
        self._buckets: dict[ModelId, deque[_Bucket]] = {}
        self._running: Counter[ModelId] = Counter()
        """Requests that run now, on all workers."""

    def on_report(self, report: Report, now: float) -> None:
        """Add what has come since the report before."""
        self._since = now if self._since is None else self._since
        worker = WorkerId(report.worker)
        for model in report.models:
            key = worker, ModelId(model.model)
            counters, last = _counters(report.incarnation, model), self._last.get(key)
            self._last[key] = counters
            if last is not None and last.incarnation == counters.incarnation and last != counters:
                self._add(ModelId(model.model), last, counters, self._speeds.get(worker, 1.0), now)
            self._running[key[1]] += counters.num_running - (0 if last is None else last.num_running)

    def _add(self, model: ModelId, last: _Counters, new: _Counters, speed: float, now: float) -> None:
        buckets = self._buckets.setdefault(model, deque())
        if not buckets or now >= buckets[-1].begin + BUCKET:
            buckets.append(_Bucket(now, self._running[model]))
        bucket = buckets[-1]
        bucket.num_tokens += new.num_tokens - last.num_tokens
        bucket.seconds += (new.seconds - last.seconds) * speed
        bucket.num_requests += new.num_requests - last.num_requests

    def load(self, model: ModelId, now: float) -> Load:
        """Its rates at this time."""
        buckets = self._buckets.get(model)
        while buckets and buckets[0].begin <= now - self._window:
            buckets.popleft()
        if not buckets or self._since is None:
            return Load()
        seen = min(self._window, max(now - self._since, self._window * LEAST_SHARE))
        num_requests = buckets[0].num_running + sum(bucket.num_requests for bucket in buckets)
        return Load(
            sum(bucket.num_tokens for bucket in buckets) / seen,
            sum(bucket.seconds for bucket in buckets) / seen,
            max(1, num_requests) ** -0.5,
        )


def _counters(incarnation: int, model: ModelReport) -> _Counters:
    tokens = model.prompt_tokens + model.decoded_tokens
    return _Counters(incarnation, tokens, model.device_seconds, model.num_started, model.num_running)
