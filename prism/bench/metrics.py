"""Figures of a run, by the names and meanings of `vllm bench serve`, and attainments. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from prism.bench.outcomes import Failed, Finished, Record, Refused, TimedOut

METRICS = ("ttft", "tpot", "itl", "e2el")


class Attained(NamedTuple):
    """Whether a request met its objectives; None where it has none."""

    ttft: bool | None
    tpot: bool | None
    both: bool | None


def attained(record: Record) -> Attained:
    """What did not finish met nothing. One token has no time per output token, which counts as met."""
    wanted = record.request.target.objectives
    ok = record.is_finished
    ttft = None if wanted.ttft is None else ok and record.ttft <= wanted.ttft
    tpot = None if wanted.tpot is None else ok and (record.tpot or 0.0) <= wanted.tpot
    known = [met for met in (ttft, tpot) if met is not None]
    return Attained(ttft, tpot, all(known) if known else None)


def is_good(record: Record) -> bool:
    """Finished within all of its objectives, `e2el` included."""
    wanted = record.request.target.objectives
    in_time = wanted.e2el is None or record.latency <= wanted.e2el
    return record.is_finished and in_time and attained(record).both is not False


def attainment(records: Iterable[Record]) -> dict[str, float | None]:
    """Shares of requests that met their objectives, of those that have some."""
    met = [attained(record) for record in records]
    return {
        name: _share([m for each in met if (m := getattr(each, name)) is not None])
        for name in Attained._fields
    }


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def summarise(
    records: Sequence[Record], duration: float, metrics: Sequence[str], percentiles: Sequence[float]
) -> dict[str, Any]:
    """The fields of a result, of one model or of all."""
    finished = [record for record in records if record.is_finished]
    has_objectives = any(not record.request.target.objectives.is_empty for record in records)
    num_input = sum(record.input_tokens for record in finished)
    num_output = sum(record.output_tokens for record in finished)
    fields: dict[str, Any] = {
        "num_requests": len(records),
        "duration": duration,
        "completed": len(finished),
        "failed": len(records) - len(finished),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(finished) / duration,
        "request_goodput": sum(map(is_good, records)) / duration if has_objectives else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_concurrent_requests": max_concurrent(finished),
    }
    for name in metrics:
        fields |= _statistics(name, _values(name, finished), percentiles)
    return fields | {"attainment": attainment(records), "endings": endings(records), **_lengths(finished)}


def _values(name: str, finished: Sequence[Record]) -> list[float]:
    match name:
        case "ttft":
            return [record.ttft for record in finished]
        case "tpot":
            return [tpot for record in finished if (tpot := record.tpot) is not None]
        case "itl":
            return [itl for record in finished for itl in record.itls]
        case _:
            return [record.latency for record in finished]


def _statistics(name: str, seconds: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    values = 1000 * np.asarray(seconds or [0.0])
    fields = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return fields | {f"p{p:g}_{name}_ms": float(np.percentile(values, p)) for p in percentiles}


def endings(records: Iterable[Record]) -> dict[str, Any]:
    """How many ended how; their sum is the number of requests."""
    refused: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    num_finished = num_timed_out = 0
    for record in records:
        match record.outcome:
            case Finished():
                num_finished += 1
            case Refused(status=status):
                refused[str(status)] += 1
            case Failed(reason=reason):
                failed[reason] += 1
            case TimedOut():
                num_timed_out += 1
    return {
        "finished": num_finished,
        "refused": dict(refused),
        "broken": dict(failed),
        "timed_out": num_timed_out,
    }


def _lengths(finished: Sequence[Record]) -> dict[str, int]:
    """Answers that are no measure of what was asked: other prompts or fewer tokens than planned."""
    return {
        "num_other_prompt_length": sum(r.input_tokens != r.request.prompt for r in finished),
        "num_short_outputs": sum(r.output_tokens < r.request.output for r in finished),
    }


def max_concurrent(records: Iterable[Record]) -> int:
    """Most requests that were under way at a time; who ends makes room for who starts at that moment."""
    events = sorted(event for r in records for event in ((r.start, 1), (r.start + r.latency, -1)))
    peak = active = 0
    for _, change in events:
        active += change
        peak = max(peak, active)
    return peak


def lateness(records: Iterable[Record]) -> dict[str, float]:
    """How late requests left, in milliseconds: a slow client measures itself."""
    late = 1000 * np.asarray([record.lateness for record in records] or [0.0])
    return {
        "mean_lateness_ms": float(late.mean()),
        "p99_lateness_ms": float(np.percentile(late, 99)),
        "max_lateness_ms": float(late.max()),
    }


def by_model(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by the trace's keys, in order."""
    result: dict[str, list[Record]] = {}
    for record in records:
        result.setdefault(record.request.target.key, []).append(record)
    return dict(sorted(result.items()))
