"""The options of `prism bench` in groups: those that `vllm bench serve` has are named as there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

SERVER, TRAFFIC, SENDING, OBJECTIVES, RESULTS = "Server", "Traffic", "Requests", "Objectives", "Results"


def _in(panel: str, help: str, *names: str) -> Any:
    return Option(*names, help=help, rich_help_panel=panel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Who is asked."""

    base_url: Annotated[str, _in(SERVER, "Where the server is.")] = "http://127.0.0.1:8000"
    endpoint: Annotated[str, _in(SERVER, "Or /v1/chat/completions.")] = "/v1/completions"
    model: Annotated[str | None, _in(SERVER, "Served name of all models of the traffic.")] = None
    models: Annotated[
        Path | None,
        _in(
            SERVER,
            "YAML or JSON with model, base_url, endpoint, tokenizer, context, ttft, tpot for each model "
            "of the traffic.",
        ),
    ] = None
    tokenizer: Annotated[
        Path | None, _in(SERVER, "Model directory: prompts are texts of its tokens, not token ids.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is asked, and when."""

    dataset_name: Annotated[str, _in(TRAFFIC, "trace, synthetic or random.")] = "random"
    dataset_path: Annotated[
        Path | None, _in(TRAFFIC, "CSV with arrival_s, model_key, prompt_tokens, output_tokens.")
    ] = None
    num_prompts: Annotated[int | None, _in(TRAFFIC, "Requests of random; 1000 by default.")] = None
    request_rate: Annotated[float, _in(TRAFFIC, "Requests a second; inf sends all at once.")] = float("inf")
    burstiness: Annotated[
        float, _in(TRAFFIC, "Shape of the gaps' gamma distribution: 1 is Poisson, less comes in bursts.")
    ] = 1.0
    time_scale: Annotated[float, _in(TRAFFIC, "So many times as fast.")] = 1.0
    rate_scale: Annotated[float, _in(TRAFFIC, "So many times as many requests in the same time.")] = 1.0
    max_requests: Annotated[int | None, _in(TRAFFIC, "The first so many alone.")] = None
    input_len: Annotated[
        int, _in(TRAFFIC, "Tokens of prompts; the median of synthetic.", "--input-len", "--random-input-len")
    ] = 1024
    output_len: Annotated[
        int, _in(TRAFFIC, "Tokens of outputs, the same way.", "--output-len", "--random-output-len")
    ] = 128
    range_ratio: Annotated[
        float, _in(TRAFFIC, "random: lengths are within this share.", "--random-range-ratio")
    ] = 0.0
    num_models: Annotated[int | None, _in(TRAFFIC, "synthetic: models, unless --models says; 8.")] = None
    seed: Annotated[int, _in(TRAFFIC, "The same seed makes the same requests.")] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What the traffic `synthetic` is like."""

    duration: Annotated[float, _in(TRAFFIC, "synthetic: seconds.")] = 600.0
    alpha: Annotated[float, _in(TRAFFIC, "synthetic: exponent of the popularity's power law.")] = 2.1
    on: Annotated[float, _in(TRAFFIC, "synthetic: mean seconds for which a model is asked; 0 is always.")] = (
        0.0
    )
    off: Annotated[float, _in(TRAFFIC, "synthetic: mean seconds of the rests in between.")] = 0.0
    spread: Annotated[
        float, _in(TRAFFIC, "synthetic: spread of the lengths' logarithms.", "--length-spread")
    ] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How requests are sent."""

    max_concurrency: Annotated[int | None, _in(SENDING, "Most requests under way; others wait here.")] = None
    timeout: Annotated[float, _in(SENDING, "Seconds after which a request is given up.")] = 600.0
    ignore_eos: Annotated[bool, _in(SENDING, "Ask for outputs of the full length.")] = True
    temperature: Annotated[float | None, _in(SENDING, "Left to the server if not given.")] = None
    token_ids: Annotated[str, _in(SENDING, "LOW:HIGH, range of prompts' token ids.")] = "10:250"
    header: Annotated[list[str] | None, _in(SENDING, "NAME=VALUE, sent with all requests.")] = None
    extra_body: Annotated[str, _in(SENDING, "JSON object with further fields of bodies.")] = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What is in time."""

    goodput: Annotated[
        list[str] | None, _in(OBJECTIVES, "ttft:MS tpot:MS e2el:MS, where the models file says nothing.")
    ] = None
    baseline: Annotated[
        Path | None, _in(OBJECTIVES, "Measure each model alone, write its P95s into this file, and end.")
    ] = None
    baseline_requests: Annotated[int, _in(OBJECTIVES, "Requests of each model for that.")] = 20
    slo_from: Annotated[
        Path | None, _in(OBJECTIVES, "Objectives are those of this baseline file times --slo-scale.")
    ] = None
    slo_scale: Annotated[float, _in(OBJECTIVES, "See --slo-from.")] = 5.0
    send_slo: Annotated[
        bool, _in(OBJECTIVES, "Tell the server, by x-slo-ttft-ms and x-slo-tpot-ms.", "--send-slo")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What is told and written."""

    percentile_metrics: Annotated[str, _in(RESULTS, "Of ttft, tpot, itl, e2el.")] = "ttft,tpot,itl,e2el"
    metric_percentiles: Annotated[str, _in(RESULTS, "Percentiles that are told.")] = "99"
    save_result: Annotated[bool, _in(RESULTS, "Write a JSON file.", "--save-result")] = False
    save_detailed: Annotated[bool, _in(RESULTS, "With each request.", "--save-detailed")] = False
    result_dir: Annotated[Path | None, _in(RESULTS, "Where it goes.")] = None
    result_filename: Annotated[str | None, _in(RESULTS, "Its name.")] = None
    html: Annotated[Path | None, _in(RESULTS, "Write a report with plots into this file.")] = None
    label: Annotated[str | None, _in(RESULTS, "Begins the result's name.")] = None
