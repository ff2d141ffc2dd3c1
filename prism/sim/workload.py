"""What is served: the models of a trace with their costs and objectives, and its requests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from prism.costs import Costs
from prism.errors import ConfigError
from prism.profile import Count, Positive, Profile
from prism.sim.jobs import Job, Served
from prism.sim.shapes import ARCHITECTURES, published_mix
from prism.sim.ticks import to_ticks
from prism.sim.trace import TraceRow, by_popularity, clip
from prism.types import ModelId, RequestId, Slo

PERCENTILE = 0.95


class ModelEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a models file says of a key of the trace."""

    shape: str
    """A model of the profile, or one of `sim/shapes.py`."""
    ttft: Positive | None = None
    """Objectives in seconds; else the model's P95 alone on a device times the scale."""
    tpot: Positive | None = None
    context: Count | None = None
    """Most tokens of prompt and output; by default that of a known shape."""


class Workload(NamedTuple):
    """Models and requests, in order of arrival."""

    served: dict[ModelId, Served]
    requests: list[TraceRow]
    """Clipped to the models' contexts."""
    clipped: frozenset[int]
    """Places of those that were longer."""


def read_models(path: Path, profile: Profile) -> dict[ModelId, ModelEntry]:
    """A models file: JSON, keys of the trace with their entries. Raises `ConfigError` naming the field."""
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, ModelEntry])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    known = set(ARCHITECTURES) | set(profile.models)
    problems = [
        f"{path}: shape {name} is not known; known: {', '.join(sorted(known))}"
        for name in sorted({e.shape for e in entries.values()} - known)
    ]
    problems += [
        f"{path}: {name}.context is missing, and the profile does not tell it"
        for name, e in sorted(entries.items())
        if e.context is None and e.shape in known - set(ARCHITECTURES)
    ]
    if problems:
        raise ConfigError(problems)
    return {ModelId(name): entry for name, entry in entries.items()}


def workload(
    rows: Sequence[TraceRow], profile: Profile, slo_scale: float, entries: Mapping[ModelId, ModelEntry] | None
) -> Workload:
    """Models of the given entries, or of the published mix, and the requests as they can be served."""
    keys = by_popularity(rows)
    if entries is None:
        entries = {model: ModelEntry(shape=shape) for model, shape in published_mix(keys).items()}
    if missing := [key for key in keys if key not in entries]:
        raise ConfigError([f"model {key} of the trace is not in the models file" for key in missing])
    contexts = {key: _context(entries[key]) for key in keys}
    requests = [_clipped(row, contexts[row.model]) for row in rows]
    clipped = frozenset(i for i, (a, b) in enumerate(zip(rows, requests, strict=True)) if a != b)
    by_model: dict[ModelId, list[TraceRow]] = defaultdict(list)
    for row in requests:
        by_model[row.model].append(row)
    served = {}
    for key in keys:
        entry = entries[key]
        known = ARCHITECTURES.get(entry.shape)
        costs = profile.costs(entry.shape, None if known is None else known.shape)
        alone = objectives(by_model[key], costs, slo_scale)
        slo = Slo(entry.ttft or alone.ttft, entry.tpot or alone.tpot)
        served[key] = Served(key, entry.shape, costs, contexts[key], slo)
    return Workload(served, requests, clipped)


def _context(entry: ModelEntry) -> int:
    return entry.context or ARCHITECTURES[entry.shape].context


def _clipped(row: TraceRow, context: int) -> TraceRow:
    prompt, output = clip(row.prompt, row.output, context)
    return row._replace(prompt=prompt, output=output)


def objectives(rows: Iterable[TraceRow], costs: Costs, scale: float) -> Slo:
    """P95 of a model's requests alone on a device, by the cost model, times `scale`.

    Alone means one at a time: a first token costs its prompt, each further one a step of batch 1 over the
    context that the request has in the middle of its output.
    """
    rows = list(rows) or [TraceRow(0.0, ModelId(""), 1, 1)]
    first = [costs.steps.prefill(row.prompt) for row in rows]
    next_ones = [costs.steps.decode(1, row.prompt + row.output / 2) for row in rows]
    return Slo(scale * percentile(first, PERCENTILE), scale * percentile(next_ones, PERCENTILE))


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -int(-share * len(ordered) // 1) - 1))]


def jobs_of(load: Workload) -> list[Job]:
    """Fresh requests for a run."""
    jobs: list[Job] = []
    for index, row in enumerate(load.requests):
        arrival = to_ticks(row.arrival)
        due = arrival + to_ticks(load.served[row.model].slo.ttft)
        name = RequestId(f"{index:08d}")
        jobs.append(Job(name, row.model, arrival, row.prompt, row.output, due, index in load.clipped))
    return jobs
