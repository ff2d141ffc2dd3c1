"""What was asked of each model within a sliding window, from counters in the workers' reports. Pure."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add, sub

from prism.messages import WAITS, ModelReport, Report
from prism.types import ModelId, WorkerId

BUCKET = 1.0
"""Seconds that are kept as one sum."""
BEYOND = 1 / 4
"""Of the time that a model takes though its objectives do not ask for it: others are slower meanwhile."""
DOUBT = 2.0
"""Standard deviations of the number of late requests that are left out: a few may be chance."""
LEAST_SHARE = 1 / 3
"""Share of the window that must have been seen before rates are what was seen; they grow until then."""


@dataclass(frozen=True, slots=True)
class Load:
    """Rates of one model, over all of its workers."""

    token_rate: float = 0.0
    compute: float = 0.0
    """Seconds a second of a device of speed 1: what the objectives ask for, and `BEYOND` of what is taken."""
    busy: float = 0.0
    """The same as measured: steps may come sooner than they must."""
    request_rate: float = 0.0
    late: float = 0.0
    """Share of the requests whose first token was late for want of the device, beyond doubt."""
    blocked: tuple[float, ...] = (0.0,) * len(WAITS)
    """Seconds a second in which who comes waits longer than each of `WAITS` for the end of a step."""
    noise: float = 1.0
    """Relative standard deviation: requests come at random, so it is one over the root of how many were seen,
    those that began in the window and those that ran when it began."""


_Sums = tuple[float, ...]
"""Requests that began and that were late, tokens, seconds needed, busy, and blocked for each of `WAITS`."""


@dataclass(slots=True)
class _Bucket:
    begin: float
    num_running: int
    """Requests that ran when it began."""
    sums: _Sums


@dataclass(frozen=True, slots=True)
class _Counters:
    report: ModelReport = field(compare=False)
    incarnation: int
    num_running: int
    sums: _Sums


class DemandWindow:
    """Differences between reports; a worker's first report is where its counting begins."""

    def __init__(self, window: float, speeds: dict[WorkerId, float]) -> None:
        self._window = window
        self._speeds = speeds
        self._since: float | None = None
        self._last: dict[WorkerId, dict[ModelId, _Counters]] = {}
        self._buckets: dict[ModelId, deque[_Bucket]] = {}
        self._running: Counter[ModelId] = Counter()
        """Requests that run now, on all workers."""

    def on_report(self, report: Report, now: float) -> None:
        """Add what has come since the report before."""
        self._since = now if self._since is None else self._since
        worker = WorkerId(report.worker)
        counted = self._last.setdefault(worker, {})
        for model in report.models:
            name = ModelId(model.model)
            last = counted.get(name)
            if last is not None and last.report is model:
                continue  # told again as it was
            counters = counted[name] = _counters(report.incarnation, model)
            if last is not None and last.incarnation == counters.incarnation and last != counters:
                self._add(name, last, counters, self._speeds.get(worker, 1.0), now)
            self._running[name] += counters.num_running - (0 if last is None else last.num_running)

    def _add(self, model: ModelId, last: _Counters, new: _Counters, speed: float, now: float) -> None:
        buckets = self._buckets.setdefault(model, deque())
        if not buckets or now >= buckets[-1].begin + BUCKET:
            buckets.append(_Bucket(now, self._running[model], (0.0,) * len(new.sums)))
        requests, late, tokens, needed, busy, *blocked = map(sub, new.sums, last.sums)
        parts = requests, late, tokens, needed * speed, busy * speed, *blocked
        buckets[-1].sums = tuple(map(add, buckets[-1].sums, parts))

    def load(self, model: ModelId, now: float) -> Load:
        """Its rates at this time."""
        buckets = self._buckets.get(model)
        while buckets and buckets[0].begin <= now - self._window:
            buckets.popleft()
        if not buckets or self._since is None:
            return Load()
        seen = min(self._window, max(now - self._since, self._window * LEAST_SHARE))
        sums = [sum(parts) for parts in zip(*(bucket.sums for bucket in buckets), strict=True)]
        requests, _, tokens, needed, busy, *blocked = (each / seen for each in sums)
        noise = max(1.0, buckets[0].num_running + sums[0]) ** -0.5
        compute = needed + BEYOND * (busy - needed)
        late = _beyond_doubt(sums[1]) / max(1.0, sums[0])
        return Load(tokens, compute, busy, requests, late, tuple(blocked), noise)

    def is_late_since(self, model: ModelId, since: float) -> bool:
        """Whether first tokens have been late after that, more than may be chance."""
        buckets = self._buckets.get(model, ())
        return _beyond_doubt(sum(bucket.sums[1] for bucket in buckets if bucket.begin > since)) > 0


def _beyond_doubt(num_late: float) -> float:
    return max(0.0, num_late - DOUBT * math.sqrt(num_late))


def _counters(incarnation: int, model: ModelReport) -> _Counters:
    tokens = model.prompt_tokens + model.decoded_tokens
    seconds = model.needed_seconds, model.device_seconds, *_blocked(model.blocked_seconds)
    sums = (model.num_started, model.num_late, tokens, *seconds)
    return _Counters(model, incarnation, model.num_running, sums)


def _blocked(seconds: Sequence[float]) -> Sequence[float]:
    """A worker that has run nothing may leave them out."""
    return seconds or (0.0,) * len(WAITS)
