"""The verb `bench`: options as `vllm bench serve` names them, and those of traces, objectives, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from prism.errors import ConfigError

SERVER, TRAFFIC, SENDING, OBJECTIVES, RESULTS = "Server", "Traffic", "Requests", "Objectives", "Results"


def _in(panel: str, help: str, *names: str) -> Any:
    return Option(*names, help=help, rich_help_panel=panel)


def bench(
    more_goodput: Annotated[list[str] | None, Argument(metavar="[NAME:MS]...", hidden=True)] = None,
    base_url: Annotated[str, _in(SERVER, "Where the server is.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[str, _in(SERVER, "Or /v1/chat/completions.")] = "/v1/completions",
    model: Annotated[str | None, _in(SERVER, "Served name of all models of the traffic.")] = None,
    models: Annotated[
        Path | None,
        _in(
            SERVER,
            "YAML or JSON with model, base_url, endpoint, tokenizer, context, ttft, tpot for each model "
            "of the traffic.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, _in(SERVER, "Model directory: prompts are texts of its tokens, not token ids.")
    ] = None,
    dataset_name: Annotated[str, _in(TRAFFIC, "trace, synthetic or random.")] = "random",
    dataset_path: Annotated[
        Path | None, _in(TRAFFIC, "CSV with arrival_s, model_key, prompt_tokens, output_tokens.")
    ] = None,
    num_prompts: Annotated[int | None, _in(TRAFFIC, "Requests of random; 1000 by default.")] = None,
    request_rate: Annotated[float, _in(TRAFFIC, "Requests a second; inf sends all at once.")] = float("inf"),
    burstiness: Annotated[
        float, _in(TRAFFIC, "Shape of the gaps' gamma distribution: 1 is Poisson, less comes in bursts.")
    ] = 1.0,
    time_scale: Annotated[float, _in(TRAFFIC, "So many times as fast.")] = 1.0,
    rate_scale: Annotated[float, _in(TRAFFIC, "So many times as many requests in the same time.")] = 1.0,
    max_requests: Annotated[int | None, _in(TRAFFIC, "The first so many alone.")] = None,
    input_len: Annotated[
        int, _in(TRAFFIC, "Tokens of prompts; the median of synthetic.", "--input-len", "--random-input-len")
    ] = 1024,
    output_len: Annotated[
        int, _in(TRAFFIC, "Tokens of outputs, the same way.", "--output-len", "--random-output-len")
    ] = 128,
    random_range_ratio: Annotated[float, _in(TRAFFIC, "random: lengths are within this share.")] = 0.0,
    duration: Annotated[float, _in(TRAFFIC, "synthetic: seconds.")] = 600.0,
    num_models: Annotated[int | None, _in(TRAFFIC, "synthetic: models, unless --models says; 8.")] = None,
    alpha: Annotated[float, _in(TRAFFIC, "synthetic: exponent of the popularity's power law.")] = 2.1,
    on: Annotated[
        float, _in(TRAFFIC, "synthetic: mean seconds for which a model is asked; 0 is always.")
    ] = 0.0,
    off: Annotated[float, _in(TRAFFIC, "synthetic: mean seconds of the rests in between.")] = 0.0,
    length_spread: Annotated[float, _in(TRAFFIC, "synthetic: spread of the lengths' logarithms.")] = 1.0,
    seed: Annotated[int, _in(TRAFFIC, "The same seed makes the same requests.")] = 0,
    max_concurrency: Annotated[int | None, _in(SENDING, "Most requests under way; others wait here.")] = None,
    timeout: Annotated[float, _in(SENDING, "Seconds after which a request is given up.")] = 600.0,
    ignore_eos: Annotated[bool, _in(SENDING, "Ask for outputs of the full length.")] = True,
    temperature: Annotated[float | None, _in(SENDING, "Left to the server if not given.")] = None,
    token_ids: Annotated[str, _in(SENDING, "LOW:HIGH, range of prompts' token ids.")] = "10:250",
    header: Annotated[list[str] | None, _in(SENDING, "NAME=VALUE, sent with all requests.")] = None,
    extra_body: Annotated[str, _in(SENDING, "JSON object with further fields of bodies.")] = "{}",
    goodput: Annotated[
        list[str] | None, _in(OBJECTIVES, "ttft:MS tpot:MS e2el:MS, where the models file says nothing.")
    ] = None,
    baseline: Annotated[
        Path | None, _in(OBJECTIVES, "Measure each model alone, write its P95s into this file, and end.")
    ] = None,
    baseline_requests: Annotated[
        int,
        _in(
            OBJECTIVES,
            "Requests of each model for that.",
        ),
    ] = 20,
    slo_from: Annotated[
        Path | None, _in(OBJECTIVES, "Objectives are those of this baseline file times --slo-scale.")
    ] = None,
    slo_scale: Annotated[float, _in(OBJECTIVES, "See --slo-from.")] = 5.0,
    percentile_metrics: Annotated[str, _in(RESULTS, "Of ttft, tpot, itl, e2el.")] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, _in(RESULTS, "Percentiles that are told.")] = "99",
    save_result: Annotated[bool, _in(RESULTS, "Write a JSON file.", "--save-result")] = False,
    save_detailed: Annotated[bool, _in(RESULTS, "With each request.", "--save-detailed")] = False,
    result_dir: Annotated[Path | None, _in(RESULTS, "Where it goes.")] = None,
    result_filename: Annotated[str | None, _in(RESULTS, "Its name.")] = None,
    html: Annotated[Path | None, _in(RESULTS, "Write a report with plots into this file.")] = None,
    label: Annotated[str | None, _in(RESULTS, "Begins the result's name.")] = None,
) -> None:
    """Send traffic to an OpenAI-compatible server at its times, and measure what comes back."""
    # so long because typer reads options off the signature, each with its help
    from prism.bench.options import Options, parse_goodput, parse_headers
    from prism.bench.run import run_bench
    from prism.sim.generate import Synthetic

    for word in more_goodput or []:
        if not goodput or ":" not in word:
            raise ConfigError([f"unexpected {word}"])
    options = Options(
        base_url=base_url,
        endpoint=endpoint,
        model=model,
        models=models,
        tokenizer=tokenizer,
        dataset_name=dataset_name,
        dataset_path=dataset_path,
        num_prompts=num_prompts,
        request_rate=request_rate,
        burstiness=burstiness,
        time_scale=time_scale,
        rate_scale=rate_scale,
        max_requests=max_requests,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        synthetic=Synthetic(
            duration=duration,
            alpha=alpha,
            on=on,
            off=off,
            prompt=input_len,
            output=output_len,
            spread=length_spread,
        ),
        num_models=num_models,
        seed=seed,
        max_concurrency=max_concurrency,
        timeout=timeout,
        ignore_eos=ignore_eos,
        temperature=temperature,
        token_ids=_range(token_ids),
        headers=parse_headers(header or []),
        extra_body=_object(extra_body),
        goodput=parse_goodput([*(goodput or []), *(more_goodput or [])]),
        baseline=baseline,
        baseline_requests=baseline_requests,
        slo_from=slo_from,
        slo_scale=slo_scale,
        percentile_metrics=tuple(percentile_metrics.split(",")),
        metric_percentiles=_numbers(metric_percentiles),
        save_result=save_result,
        save_detailed=save_detailed,
        result_dir=result_dir,
        result_filename=result_filename,
        html=html,
        label=label,
    )
    raise typer.Exit(run_bench(options))


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        return int(low), int(high)
    except ValueError:
        raise ConfigError([f"--token-ids {text}: must be LOW:HIGH"]) from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError([f"--extra-body: {error}"]) from None
    if not isinstance(value, dict):
        raise ConfigError(["--extra-body: must be a JSON object"])
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError([f"--metric-percentiles {text}: must be numbers with commas"]) from None
