"""`prism bench` from its options to its results."""

from __future__ import annotations

import asyncio
import gc
import resource
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import uvloop

from prism.bench.baseline import (
    Baseline,
    ModelBaseline,
    measure,
    quantile_requests,
    read_baseline,
    with_objectives,
    write_baseline,
)
from prism.bench.options import Options, check
from prism.bench.progress import show_progress
from prism.bench.replay import Replay, Run
from prism.bench.results import make_result, write_result
from prism.bench.summary import print_baseline, print_result
from prism.bench.targets import Defaults, Entry, Target, make_targets, read_models
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned, Steady, plan, scaled_rate, steady
from prism.errors import ConfigError
from prism.outputs import REPORT_ENDINGS, check_output, make_folder
from prism.sim.generate import Synthetic, generate
from prism.sim.trace import TraceRow, by_popularity, compress, read_trace


def run_bench(options: Options) -> int:
    """The exit status: 1 if no request was answered. Raises `ConfigError`."""
    check(options)
    now = datetime.now()
    planned = make_plan(options)
    _check_outputs(options, now)
    _raise_file_limit()
    if options.baseline is not None:
        baseline = Baseline(_measure_baseline(planned, options), f"{now:%Y%m%d-%H%M%S}")
        write_baseline(baseline, options.baseline)
        print_baseline(baseline, options.slo_scale)
        return 0
    run = _replay(planned, options)
    result = make_result(run, options, now)
    _write(run, result, options, now)
    print_result(result)
    return 0 if result["completed"] else 1


def _check_outputs(options: Options, now: datetime) -> None:
    """Now, not after an hour."""
    if options.baseline is not None:
        check_output("--baseline", options.baseline)
    if options.html is not None:
        from prism.bench import plots  # noqa: F401  (tells that matplotlib is missing)

        check_output("--html", options.html, REPORT_ENDINGS)
    if (path := options.result_path(now)) is not None:
        make_folder("--result-dir", options.result_dir or Path())
        check_output("--result-filename", path)


def make_plan(options: Options) -> list[Planned]:
    """Who is asked what, and when. Raises `ConfigError`."""
    with _naming("--models"):
        entries = None if options.models is None else read_models(options.models)
    rows = _rows(options, entries)
    if options.max_requests is not None:
        rows = rows[: options.max_requests]
    if not rows:
        raise ConfigError(["there are no requests to send"])
    with _naming("" if entries is None else f"--models {options.models}:"):
        targets = _targets(rows, entries, options)
    if options.slo_from is not None:
        with _naming("--slo-from"):
            targets = with_objectives(targets, read_baseline(options.slo_from), options.slo_scale)
    return plan(rows, targets)


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Problems begin with the option that they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{option} {problem}".lstrip() for problem in error.problems]) from None


def _rows(options: Options, entries: dict[str, Entry] | None) -> list[TraceRow]:
    match options.dataset_name:
        case "trace":
            assert options.dataset_path is not None
            with _naming("--dataset-path"):
                rows = read_trace(options.dataset_path)
        case "synthetic":
            rows = _renamed(generate(_synthetic(options, entries), options.seed), entries)
        case _:
            count = 1000 if options.num_prompts is None else options.num_prompts
            traffic = Steady(
                count,
                options.request_rate,
                options.burstiness,
                options.input_len,
                options.output_len,
                options.range_ratio,
            )
            rows = steady(traffic, list(entries or [options.model or "default"]), options.seed)
    if options.rate_scale != 1:
        rows = scaled_rate(rows, options.rate_scale, options.seed)
    return compress(rows, options.time_scale)


def _synthetic(options: Options, entries: dict[str, Entry] | None) -> Synthetic:
    """Burstiness is vLLM's: the shape of gaps whose coefficient of variation is its root's inverse."""
    count = options.num_models or options.synthetic.models if entries is None else len(entries)
    cv = options.burstiness**-0.5
    return replace(options.synthetic, models=count, rate=options.request_rate, cv=cv)


def _renamed(rows: list[TraceRow], entries: dict[str, Entry] | None) -> list[TraceRow]:
    """A made trace has made names: the models file's stand in for them, the most asked for the first."""
    if entries is None:
        return rows
    names = dict(zip(by_popularity(rows), entries, strict=False))
    return [row._replace(model=names[row.model]) for row in rows if row.model in names]  # type: ignore[arg-type]


def _targets(
    rows: Sequence[TraceRow], entries: dict[str, Entry] | None, options: Options
) -> dict[str, Target]:
    defaults = Defaults(options.base_url, options.endpoint, options.model, options.tokenizer, options.goodput)
    return make_targets(by_popularity(rows), entries, defaults)


def _style(options: Options) -> Style:
    return Style(
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        extra_body=options.extra_body,
        headers=options.headers,
        sends_slo=options.send_slo,
        token_ids=options.token_ids,
    )


def _measure_baseline(planned: Sequence[Planned], options: Options) -> dict[str, ModelBaseline]:
    chosen = quantile_requests(planned, options.baseline_requests)
    work = measure(chosen, _style(options), timeout=options.timeout, seed=options.seed)
    models: dict[str, ModelBaseline] = uvloop.run(work)
    return models


def _replay(planned: Sequence[Planned], options: Options) -> Run:
    requests = encode_all(planned, _style(options), options.seed)
    gc.collect()
    gc.freeze()  # a collection over all prompts would hold up whoever is due
    with show_progress(len(planned)) as ended:
        replay = Replay(
            planned,
            requests,
            timeout=options.timeout,
            max_concurrency=options.max_concurrency,
            on_end=ended,
        )
        try:
            run: Run = uvloop.run(_until_interrupted(replay))
            return run
        finally:
            gc.unfreeze()


async def _until_interrupted(replay: Replay) -> Run:
    """Ctrl-C ends the run, and what has been measured is told."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, replay.stop)
    try:
        return await replay.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _write(run: Run, result: dict[str, Any], options: Options, now: datetime) -> None:
    path: Path | None = options.result_path(now)
    if path is not None:
        write_result(result, path)
    if options.html is not None:
        from prism.bench.report import write_report

        write_report(run, result, options.html)


def _raise_file_limit() -> None:
    """Each request under way has a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
