"""The result of a run: the JSON object of `vllm bench serve`, and the same of each model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from prism.bench import metrics
from prism.bench.options import Options
from prism.bench.outcomes import Failed, Finished, Outcome, Record, Refused, TimedOut
from prism.bench.replay import Run


def make_result(run: Run, options: Options, now: datetime) -> dict[str, Any]:
    """All figures."""
    records = run.records
    served = sorted({record.request.target.model for record in records})
    tokenizers = sorted({str(t) for record in records if (t := record.request.target.tokenizer) is not None})
    result: dict[str, Any] = {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "backend": "openai",
        "endpoint_type": "openai",
        "label": options.label,
        "model_id": ",".join(served),
        "tokenizer_id": ",".join(tokenizers) or None,
        "num_prompts": len(records),
        "request_rate": options.request_rate if math.isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "dataset_name": options.dataset_name,
        "dataset_path": None if options.dataset_path is None else str(options.dataset_path),
        "time_scale": options.time_scale,
        "rate_scale": options.rate_scale,
        "seed": options.seed,
        "slo_scale": None if options.slo_from is None else options.slo_scale,
        "send_slo": options.send_slo,
    }
    result |= _summary(records, run.duration, options) | metrics.lateness(records)
    result["models"] = {
        key: _of_model(own, run.duration, options) for key, own in metrics.by_model(records).items()
    }
    return result | (_details(records) if options.save_detailed else {})


def _summary(records: Sequence[Record], duration: float, options: Options) -> dict[str, Any]:
    return metrics.summarise(records, duration, options.percentile_metrics, options.metric_percentiles)


def _of_model(records: Sequence[Record], duration: float, options: Options) -> dict[str, Any]:
    target = records[0].request.target
    objectives = {
        f"{name}_ms": None if value is None else 1000 * value
        for name, value in target.objectives._asdict().items()
    }
    return {"model_id": target.model, "slo": objectives} | _summary(records, duration, options)


def _details(records: Sequence[Record]) -> dict[str, Any]:
    """One entry a request, in seconds, as vLLM has them; those that did not finish have an error."""
    return {
        "model_keys": [record.request.target.key for record in records],
        "input_lens": [record.input_tokens for record in records],
        "output_lens": [record.output_tokens if record.is_finished else 0 for record in records],
        "start_times": [record.start for record in records],
        "queue_times": [record.lateness for record in records],
        "ttfts": [record.ttft for record in records],
        "itls": [record.itls for record in records],
        "latencies": [record.latency for record in records],
        "errors": [describe(record.outcome) for record in records],
    }


def describe(outcome: Outcome) -> str:
    """What went wrong, in a line; nothing if all was well."""
    match outcome:
        case Finished():
            return ""
        case Refused(status=status, message=message):
            return f"status {status}: {message}"
        case Failed(reason=reason):
            return reason
        case TimedOut(seconds=seconds):
            return f"no end within {seconds:g} s"


def write_result(result: dict[str, Any], path: Path) -> None:
    """One JSON object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(result))
