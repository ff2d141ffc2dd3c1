"""What a run is to do, checked as a whole before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from prism.bench.metrics import METRICS
from prism.bench.targets import NONE, Objectives, address_problems
from prism.errors import ConfigError
from prism.sim.generate import Synthetic

DEFAULT_INPUT, DEFAULT_OUTPUT = 1024, 128
"""vLLM's."""
DEFAULT_SLO_SCALE = 5.0
LEAST_RATE = 1e-6
SCALES = (1e-6, 1e6)
DATASETS = ("trace", "synthetic", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line; names are those of `vllm bench serve` where it has them."""

    base_url: str
    endpoint: str
    model: str | None
    models: Path | None
    tokenizer: Path | None
    # traffic
    dataset_name: str
    dataset_path: Path | None
    num_prompts: int | None
    request_rate: float
    burstiness: float
    time_scale: float
    rate_scale: float
    max_requests: int | None
    input_len: int
    output_len: int
    range_ratio: float
    synthetic: Synthetic
    """Its models, rate and burstiness are those above."""
    num_models: int | None
    seed: int
    # sending
    max_concurrency: int | None
    timeout: float
    ignore_eos: bool
    temperature: float | None
    token_ids: tuple[int, int]
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    # objectives
    goodput: Objectives = NONE
    baseline: Path | None = None
    """Measure this instead of replaying."""
    baseline_requests: int = 20
    slo_from: Path | None = None
    slo_scale: float = DEFAULT_SLO_SCALE
    send_slo: bool = False
    # results
    percentile_metrics: tuple[str, ...] = METRICS
    metric_percentiles: tuple[float, ...] = (99.0,)
    save_result: bool = False
    save_detailed: bool = False
    result_dir: Path | None = None
    result_filename: str | None = None
    html: Path | None = None
    label: str | None = None

    def result_path(self, now: datetime) -> Path | None:
        """Where the result goes; named as vLLM names it."""
        if not self.save_result:
            return None
        concurrency = "" if self.max_concurrency is None else f"-concurrency{self.max_concurrency}"
        model = (self.model or self.dataset_name).rsplit("/", 1)[-1]
        name = (
            f"{self.label or 'openai'}-{self.request_rate}qps{concurrency}-{model}-{now:%Y%m%d-%H%M%S}.json"
        )
        return (self.result_dir or Path()) / (self.result_filename or name)


def check(options: Options) -> None:
    """Raises `ConfigError` with all that is wrong or would be ignored."""
    problems = [problem for is_wrong, problem in _rules(options) if is_wrong]
    if problems:
        raise ConfigError(problems)


def _rules(o: Options) -> Iterable[tuple[bool, str]]:
    is_trace = o.dataset_name == "trace"
    yield o.dataset_name not in DATASETS, f"--dataset-name must be one of {', '.join(DATASETS)}"
    yield is_trace and o.dataset_path is None, "--dataset-name trace needs --dataset-path"
    yield not is_trace and o.dataset_path is not None, "--dataset-path goes with --dataset-name trace"
    yield is_trace and o.num_prompts is not None, "a trace has its own length: use --max-requests"
    yield (
        is_trace and o.request_rate != float("inf"),
        "a trace has its own rate: use --rate-scale or --time-scale",
    )
    yield o.dataset_name == "synthetic" and o.request_rate == float("inf"), "synthetic needs --request-rate"
    yield not 0 <= o.range_ratio < 1, "--random-range-ratio must be from 0 to 1, without 1"
    yield not 0 <= o.token_ids[0] < o.token_ids[1], "--token-ids must be LOW:HIGH"
    unknown = [name for name in o.percentile_metrics if name not in METRICS]
    yield bool(unknown), f"--percentile-metrics knows {', '.join(METRICS)}, not {', '.join(unknown)}"
    yield any(not 0 <= p <= 100 for p in o.metric_percentiles), "--metric-percentiles must be from 0 to 100"
    yield o.save_detailed and not o.save_result, "--save-detailed goes with --save-result"
    yield (
        not o.save_result and (o.result_dir is not None or o.result_filename is not None),
        "--result-dir and --result-filename go with --save-result",
    )
    for problem in address_problems(o.base_url, o.endpoint):
        yield True, f"--{problem}"
    yield from _number_rules(o)
    yield from _traffic_rules(o)
    yield (
        o.baseline is not None and (o.save_result or o.html is not None),
        "--baseline writes a baseline alone: --save-result and --html go without it",
    )
    yield (
        o.slo_scale != DEFAULT_SLO_SCALE and o.slo_from is None and o.baseline is None,
        "--slo-scale goes with --slo-from",
    )
    yield (
        o.send_slo and (o.slo_from, o.models, o.goodput) == (None, None, NONE),
        "--send-slo needs objectives: --slo-from, --goodput, or those of a --models file",
    )
    yield o.send_slo and o.baseline is not None, "--baseline measures models alone, which need no --send-slo"
    yield o.baseline is not None and o.slo_from is not None, "--baseline measures, --slo-from uses: not both"


def _number_rules(o: Options) -> Iterable[tuple[bool, str]]:
    """What would send nothing, or wait for ever."""
    counts = {
        "--num-prompts": o.num_prompts,
        "--max-requests": o.max_requests,
        "--num-models": o.num_models,
        "--max-concurrency": o.max_concurrency,
        "--baseline-requests": o.baseline_requests,
        "--input-len": o.input_len,
        "--output-len": o.output_len,
    }
    for name, count in counts.items():
        yield count is not None and count < 1, f"{name} must be at least 1"
    yield o.seed < 0, "--seed must not be negative"
    yield not o.request_rate >= LEAST_RATE, f"--request-rate must be at least {LEAST_RATE:f}, or inf"
    for name, (number, least, most) in _ranges(o).items():
        yield not least <= number <= most, f"{name} must be from {least:g} to {most:g}"


def _ranges(o: Options) -> dict[str, tuple[float, float, float]]:
    """Each number with its least and its most; no number is in none of them."""
    made = o.synthetic
    return {
        "--burstiness": (o.burstiness, 1e-2, 1e6),
        "--time-scale": (o.time_scale, *SCALES),
        "--rate-scale": (o.rate_scale, *SCALES),
        "--slo-scale": (o.slo_scale, *SCALES),
        "--timeout": (o.timeout, 1e-3, 1e6),
        "--temperature": (o.temperature or 0.0, 0.0, 100.0),
        "--duration": (made.duration, 1e-3, 1e8),
        "--alpha": (made.alpha, 1.01, 1e6),
        "--on": (made.on, 0.0, 1e8),
        "--off": (made.off, 0.0, 1e8),
        "--length-spread": (made.spread, 0.0, 100.0),
    }


def _traffic_rules(o: Options) -> Iterable[tuple[bool, str]]:
    """What would be ignored with this traffic."""
    lengths = (o.input_len, o.output_len)
    others = replace(o.synthetic, prompt=o.input_len, output=o.output_len)
    plain = Synthetic(prompt=o.input_len, output=o.output_len)
    yield (
        o.dataset_name == "trace" and lengths != (DEFAULT_INPUT, DEFAULT_OUTPUT),
        "a trace has its own lengths: --input-len and --output-len go without it",
    )
    yield (
        o.dataset_name != "synthetic" and others != plain,
        "--duration, --alpha, --on, --off and --length-spread go with --dataset-name synthetic",
    )
    yield (
        o.dataset_name != "random" and o.range_ratio != 0,
        "--random-range-ratio goes with --dataset-name random",
    )


def parse_goodput(words: Sequence[str]) -> Objectives:
    """`ttft:200 tpot:50`, in milliseconds. Raises `ConfigError`."""
    values: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition(":")
        try:
            milliseconds = float(number)
        except ValueError:
            milliseconds = -1.0
        if name not in Objectives._fields or not 0 <= milliseconds < float("inf"):
            known = ", ".join(Objectives._fields)
            raise ConfigError([f"--goodput {word}: must be NAME:MILLISECONDS, with a name of {known}"])
        values[name] = milliseconds / 1000
    return Objectives(**values)


def parse_headers(words: Sequence[str]) -> dict[str, str]:
    """`name=value`. Raises `ConfigError`."""
    pairs = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator or not name.strip() or any(c in word for c in "\r\n"):
            raise ConfigError([f"--header {word}: must be NAME=VALUE"])
        pairs[name.strip()] = value.strip()
    return pairs
