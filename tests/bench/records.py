"""Records made by hand."""

from __future__ import annotations

from prism.bench.outcomes import Finished, Outcome, Record
from prism.bench.targets import NONE, Defaults, Objectives, Target, make_targets
from prism.bench.workload import Planned


def target(key: str = "m", objectives: Objectives = NONE) -> Target:
    return make_targets([key], None, Defaults("http://h", "/v1/completions", objectives=objectives))[key]


def record(
    to: Target,
    start: float = 0.0,
    times: tuple[float, ...] = (0.1, 0.2, 0.3),
    outcome: Outcome | None = None,
    at: float | None = None,
) -> Record:
    """`times` are after the start; as many tokens as times."""
    request = Planned(0, start if at is None else at, to, 10, len(times))
    moments = tuple(start + time for time in times)
    end = moments[-1] if moments else start
    return Record(request, start, moments, end, 10, len(times), outcome or Finished())
