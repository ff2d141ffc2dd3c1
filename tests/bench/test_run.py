"""From options to requests, and the result's names."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from prism.bench.baseline import Baseline, ModelBaseline, write_baseline
from prism.bench.options import Options, check, parse_goodput
from prism.bench.replay import Run
from prism.bench.results import make_result, write_result
from prism.bench.run import make_plan
from prism.bench.targets import Objectives
from prism.errors import ConfigError
from prism.sim.generate import Synthetic
from tests.bench.records import record, target

NOW = datetime(2026, 11, 26, 12, 30)
RANDOM = Options(
    base_url="http://h",
    endpoint="/v1/completions",
    model="org/m",
    models=None,
    tokenizer=None,
    dataset_name="random",
    dataset_path=None,
    num_prompts=40,
    request_rate=8.0,
    burstiness=1.0,
    time_scale=1.0,
    rate_scale=1.0,
    max_requests=None,
    input_len=1024,
    output_len=128,
    range_ratio=0.0,
    synthetic=Synthetic(prompt=1024, output=128),
    num_models=None,
    seed=0,
    max_concurrency=None,
    timeout=10.0,
    ignore_eos=True,
    temperature=None,
    token_ids=(10, 250),
)
SYNTHETIC = replace(RANDOM, dataset_name="synthetic", num_prompts=None)


def with_models(folder: Path, options: Options, text: str) -> Options:
    path = folder / "models.yaml"
    path.write_text(text)
    return replace(options, models=path, model=None)


def test_steady_traffic_goes_to_all_models_alike(tmp_path: Path) -> None:
    options = with_models(tmp_path, replace(RANDOM, num_prompts=300), "a: {}\nb: {model: x}")
    planned = make_plan(options)
    counts = Counter(request.target.model for request in planned)
    assert set(counts) == {"a", "x"} and min(counts.values()) > 100
    assert planned[-1].at == pytest.approx(300 / 8, rel=0.01)


def test_made_traffic_has_the_models_of_the_file(tmp_path: Path) -> None:
    options = with_models(tmp_path, SYNTHETIC, "hot: {}\nwarm: {}\ncold: {}")
    planned = make_plan(options)
    counts = Counter(request.target.key for request in planned)
    assert [key for key, _ in counts.most_common()] == ["hot", "warm", "cold"]
    assert len(planned) == pytest.approx(600 * 8, rel=0.1)


def test_made_traffic_of_one_served_model() -> None:
    planned = make_plan(replace(SYNTHETIC, num_models=3))
    assert {request.target.model for request in planned} == {"org/m"}
    assert {request.target.key for request in planned} == {"m00", "m01", "m02"}


def test_the_first_requests_alone_and_faster() -> None:
    slow, fast = make_plan(RANDOM), make_plan(replace(RANDOM, max_requests=10, time_scale=2.0))
    assert len(fast) == 10
    assert [r.at for r in fast] == pytest.approx([r.at / 2 for r in slow[:10]])


def test_objectives_by_origin(tmp_path: Path) -> None:
    """The models file goes before --goodput, and both before the baseline."""
    write_baseline(Baseline({k: ModelBaseline(0.1, 0.01, 9) for k in ("a", "b")}), tmp_path / "base.json")
    options = replace(RANDOM, goodput=Objectives(tpot=0.5), slo_from=tmp_path / "base.json", slo_scale=3.0)
    planned = make_plan(with_models(tmp_path, options, "a: {}\nb: {ttft: 7s}"))
    found = {request.target.key: request.target.objectives for request in planned}
    assert found == {"a": pytest.approx(Objectives(0.3, 0.5)), "b": pytest.approx(Objectives(7.0, 0.5))}


def test_no_requests() -> None:
    with pytest.raises(ConfigError, match="no requests to send"):
        make_plan(replace(RANDOM, max_requests=0))


def test_goodput_words() -> None:
    assert parse_goodput(["ttft:200", "tpot:50", "e2el:1e3"]) == Objectives(0.2, 0.05, 1.0)
    for word in ("ttft", "x:1", "ttft:-1", "ttft:inf", "ttft:nan"):
        with pytest.raises(ConfigError, match="must be NAME:MILLISECONDS"):
            parse_goodput([word])


def test_all_mistakes_are_told_at_once() -> None:
    wrong = replace(RANDOM, burstiness=0.0, dataset_path=Path("x"), range_ratio=1.0)
    with pytest.raises(ConfigError) as caught:
        check(wrong)
    assert len(caught.value.problems) == 3
    check(RANDOM)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_prompts", 0), ("max_concurrency", 0), ("input_len", 0), ("timeout", 0.0), ("timeout", math.inf)],
)
def test_numbers_that_send_nothing_or_wait_for_ever(name: str, value: Any) -> None:
    """No prompts were 1,000, and with no concurrency the run never ended."""
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be"):
        check(replace(RANDOM, **{name: value}))


VLLM = {
    "date",
    "endpoint_type",
    "backend",
    "label",
    "model_id",
    "tokenizer_id",
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_concurrent_requests",
}
DETAILS = {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors"}


def test_results_have_vllms_names(tmp_path: Path) -> None:
    options = replace(RANDOM, request_rate=math.inf, save_result=True, save_detailed=True)
    run = Run([record(target("a")), record(target("b"))], 2.0)
    write_result(make_result(run, options, NOW), tmp_path / "new" / "r.json")
    result = json.loads((tmp_path / "new" / "r.json").read_text())
    statistics = {
        f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m in ("ttft", "tpot", "itl", "e2el")
    }
    assert VLLM | DETAILS | statistics <= set(result)
    assert (result["request_rate"], result["date"], result["model_id"]) == ("inf", "20261126-123000", "a,b")
    assert statistics <= set(result["models"]["a"])
    assert result["models"]["a"]["completed"] == 1
    plain = make_result(run, replace(options, save_detailed=False), NOW)
    assert not DETAILS & set(plain)


def test_results_are_named_as_vllm_names_them() -> None:
    options = replace(RANDOM, save_result=True, max_concurrency=4, result_dir=Path("d"))
    assert options.result_path(NOW) == Path("d/openai-8.0qps-concurrency4-m-20261126-123000.json")
    assert replace(options, result_filename="x").result_path(NOW) == Path("d/x")
    assert replace(options, save_result=False, result_dir=None).result_path(NOW) is None
