"""What a model's latencies are when nobody else is there: measured one request after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from prism.bench.outcomes import Record
from prism.bench.replay import Replay
from prism.bench.targets import Objectives, Target
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned
from prism.errors import ConfigError

VERSION = 1
PERCENTILE = 95
Seconds = Annotated[float, Meta(gt=0)]


class ModelBaseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """P95 of a model alone, in seconds."""

    ttft: Seconds
    tpot: Seconds | None
    """None if no answer had two tokens."""
    num_requests: int


class Baseline(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A baseline file: models by the trace's keys."""

    models: dict[str, ModelBaseline]
    date: str = ""
    version: int = VERSION


def quantile_requests(planned: Iterable[Planned], count: int) -> dict[Target, list[Planned]]:
    """So many requests of each model, evenly spread over its prompts' lengths; each is one of the trace's."""
    by_target: dict[Target, list[Planned]] = defaultdict(list)
    for request in planned:
        by_target[request.target].append(request)
    chosen = {}
    for target, requests in by_target.items():
        ordered = sorted(requests, key=lambda r: (r.prompt, r.output))
        places = [int((i + 0.5) / count * len(ordered)) for i in range(count)]
        chosen[target] = [replace(ordered[place], index=i, at=0.0) for i, place in enumerate(places)]
    return chosen


async def measure(
    chosen: Mapping[Target, Sequence[Planned]], style: Style, *, timeout: float, seed: int
) -> dict[str, ModelBaseline]:
    """One model after the other; the first request of each brings it in and does not count."""
    result = {}
    for target, requests in chosen.items():
        planned = [replace(requests[0], index=len(requests)), *requests]
        run = await Replay(
            planned, encode_all(planned, style, seed), timeout=timeout, max_concurrency=1
        ).run()
        result[target.key] = _baseline(target, run.records[1:])
    return result


def _baseline(target: Target, records: Sequence[Record]) -> ModelBaseline:
    bad = [record for record in records if not record.is_finished]
    if bad:
        raise ConfigError([f"model {target.key}: {len(bad)} of {len(records)} failed: {bad[0].outcome}"])
    tpots = [tpot for record in records if (tpot := record.tpot) is not None]
    return ModelBaseline(
        ttft=float(np.percentile([record.ttft for record in records], PERCENTILE)),
        tpot=float(np.percentile(tpots, PERCENTILE)) if tpots else None,
        num_requests=len(records),
    )


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Write what `read_baseline` reads."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(baseline), indent=1) + b"\n")


def read_baseline(path: Path) -> Baseline:
    """Raises `ConfigError` that names file and field."""
    try:
        baseline = msgspec.json.decode(path.read_bytes(), type=Baseline)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if baseline.version != VERSION:
        raise ConfigError([f"{path}: version must be {VERSION}, not {baseline.version}"])
    return baseline


def with_objectives(targets: Mapping[str, Target], baseline: Baseline, scale: float) -> dict[str, Target]:
    """Targets whose missing objectives are the baseline's times `scale`. Raises `ConfigError` for gaps."""
    missing = [key for key, t in targets.items() if key not in baseline.models and t.objectives.ttft is None]
    if missing:
        raise ConfigError([f"model {key} is not in the baseline" for key in missing])
    result = {}
    for key, target in targets.items():
        alone = baseline.models.get(key)
        if alone is not None:
            tpot = None if alone.tpot is None else scale * alone.tpot
            target = replace(
                target, objectives=target.objectives.filled(Objectives(scale * alone.ttft, tpot))
            )
        result[key] = target
    return result
