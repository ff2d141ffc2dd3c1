"""The command as users type it: against a server that refuses, and against the whole of Prism."""

from __future__ import annotations

import base64
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from prism.cli.main import main
from prism.demo.catalog import demo_model_path
from tests.server.harness import Server

TRACE = "arrival_s,model_key,prompt_tokens,output_tokens\n" + "".join(
    f"{1 + 0.05 * i:.2f},{'xyz'[i % 3]},{20 + i},{5 + i % 4}\n" for i in range(30)
)


def bench(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *map(str, arguments)])
    return int(caught.value.code or 0)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


@pytest.mark.slow
def test_a_trace_on_a_server_with_a_baseline_and_a_report(tmp_path: Path, trace: Path) -> None:
    models = tmp_path / "models.yaml"
    radio = demo_model_path("radio")
    models.write_text(
        f"x: {{model: adder}}\ny: {{model: speller, ttft: 0.001ms}}\nz: {{model: radio, tokenizer: {radio}}}"
    )
    with Server() as server:
        common = ("--base-url", server.url, "--models", models, "--dataset-name", "trace", "--dataset-path")
        assert bench(*common, trace, "--baseline", tmp_path / "base.json", "--baseline-requests", 4) == 0
        results = (
            "--save-result",
            "--save-detailed",
            "--result-dir",
            tmp_path,
            "--result-filename",
            "r.json",
        )
        objectives = ("--slo-from", tmp_path / "base.json", "--slo-scale", 1000)
        assert bench(*common, trace, *objectives, *results, "--html", tmp_path / "r.html") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    check_result(result)
    report = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", report), "it needs something from outside"
    images = [base64.b64decode(image) for image in re.findall(r"base64,([^\"]+)", report)]
    assert len(images) == 5 and all(b"<svg" in image for image in images)


def check_result(result: dict[str, Any]) -> None:
    assert (result["completed"], result["failed"], result["num_prompts"]) == (30, 0, 30)
    assert result["endings"] == {"finished": 30, "refused": {}, "broken": {}, "timed_out": 0}
    assert result["total_input_tokens"] == sum(20 + i for i in range(30))
    assert result["total_output_tokens"] == sum(5 + i % 4 for i in range(30))
    assert (result["num_other_prompt_length"], result["num_short_outputs"]) == (0, 0)
    assert result["input_lens"] == [20 + i for i in range(30)]
    assert result["model_keys"] == list("xyz") * 10
    assert {name: m["model_id"] for name, m in result["models"].items()} == {
        "x": "adder",
        "y": "speller",
        "z": "radio",
    }
    met = {name: m["attainment"] for name, m in result["models"].items()}
    assert met["x"] == met["z"] == {"ttft": 1.0, "tpot": 1.0, "both": 1.0}
    assert met["y"] == {"ttft": 0.0, "tpot": 1.0, "both": 0.0}
    assert result["attainment"]["both"] == pytest.approx(2 / 3)
    for start, place in zip(result["start_times"], range(30), strict=True):
        assert start >= 0.05 * place - 0.001


def test_nobody_answers(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    common = ("--dataset-name", "trace", "--dataset-path", trace, "--time-scale", 100, "--max-requests", 3)
    assert bench(*common, "--base-url", f"http://127.0.0.1:{port}") == 1
    out = capsys.readouterr().out
    assert re.search(r"Ended +0 finished, 0 refused, 3 failed, 0 timed out", out)
    assert "3 times: cannot connect" in out


SYNTHETIC = ("--dataset-name", "synthetic", "--request-rate", "1")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--dataset-name", "trace"), "--dataset-name trace needs --dataset-path"),
        (("--goodput", "ttft:1", "tpot:x"), "--goodput tpot:x: must be NAME:MILLISECONDS"),
        (("ttft:1",), "unexpected ttft:1"),
        (("--dataset-name", "synthetic"), "synthetic needs --request-rate"),
        (("--request-rate", "0"), "--request-rate must be at least 0.000001, or inf"),
        (("--percentile-metrics", "ttft,x"), "--percentile-metrics knows ttft, tpot, itl, e2el, not x"),
        (("--result-dir", "/x"), "--result-dir and --result-filename go with --save-result"),
        (("--token-ids", "7"), "--token-ids 7: must be LOW:HIGH"),
        (("--slo-scale", "3"), "--slo-scale goes with --slo-from"),
        (("--send-slo",), "--send-slo needs objectives"),
        (("--alpha", "3"), "--duration, --alpha, --on, --off and --length-spread go with"),
        (("--baseline", "b.json", "--html", "r.html"), "--baseline writes a baseline alone"),
        (("--baseline", "/nowhere/b.json"), "--baseline /nowhere/b.json: there is no folder /nowhere"),
        (("--html", "r.unknown"), "--html r.unknown: must end with .html or .htm"),
        (("--html", "/nowhere/r.html"), "--html /nowhere/r.html: there is no folder /nowhere"),
        (("--html", "/proc/r.html"), "--html /proc/r.html: cannot be written"),
        (("--save-result", "--result-dir", "/proc/r"), "--result-dir /proc/r: cannot be made"),
        (("--save-result", "--result-filename", "no/r"), "--result-filename no/r: there is no folder no"),
        (("--header", "a"), "--header a: must be NAME=VALUE"),
        (("--extra-body", "[]"), "--extra-body: must be a JSON object"),
        (("--base-url", "nowhere"), "--base-url nowhere: is no http or https address"),
        (("--base-url", "http://h:port"), "--base-url http://h:port: Port could not be cast"),
        (("--base-url", "http://h/a b"), "--base-url http://h/a b: holds characters that no address has"),
        (("--endpoint", "v1/x"), "--endpoint v1/x: must be a path that begins with /"),
        (("--endpoint", "/v1/x y"), "--endpoint /v1/x y: must be a path that begins with /"),
        (("--request-rate", "nan"), "--request-rate must be at least 0.000001, or inf"),
        (("--request-rate", "-inf"), "--request-rate must be at least 0.000001, or inf"),
        (("--burstiness", "inf"), "--burstiness must be from 0.01 to 1e+06"),
        (("--burstiness", "nan"), "--burstiness must be from 0.01 to 1e+06"),
        (("--burstiness", "0"), "--burstiness must be from 0.01 to 1e+06"),
        (("--rate-scale", "inf"), "--rate-scale must be from 1e-06 to 1e+06"),
        (("--time-scale", "nan"), "--time-scale must be from 1e-06 to 1e+06"),
        (("--timeout", "-1"), "--timeout must be from 0.001 to 1e+06"),
        (("--temperature", "nan"), "--temperature must be from 0 to 100"),
        (("--seed", "-1"), "--seed must not be negative"),
        ((*SYNTHETIC, "--duration", "-5"), "--duration must be from 0.001 to 1e+08"),
        ((*SYNTHETIC, "--on", "-1"), "--on must be from 0 to 1e+08"),
        ((*SYNTHETIC, "--off", "inf"), "--off must be from 0 to 1e+08"),
        ((*SYNTHETIC, "--alpha", "inf"), "--alpha must be from 1.01 to 1e+06"),
        (("--dataset-name", "trace", "--dataset-path", "/no.csv"), "--dataset-path /no.csv: cannot be read"),
        (("--dataset-name", "trace", "--dataset-path", "/proc"), "--dataset-path /proc: cannot be read"),
        (("--models", "/no.yaml"), "--models /no.yaml: "),
        (("--slo-from", "/no.json"), "--slo-from /no.json: "),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    arguments: tuple[str, ...],
    problem: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prism.bench.run._replay", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr("prism.bench.run._measure_baseline", lambda *_: pytest.fail("it has begun"))
    assert bench(*arguments) == 2
    assert f"error: {problem}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x: {}\ny: {}", "model z of the trace is not in the models file"),
        ("x: {}\ny: {}\nz: {endpoint: v1}", "model z: endpoint v1: must be a path that begins with /"),
        ("x: {}\ny: {}\nz: {base_url: h}", "model z: base-url h: is no http or https address"),
        ("x: {}\ny: {}\nz: {ttft: .nan}", "model z: ttft: must be a positive time"),
        ("x: {colour: 1}", "Object contains unknown field `colour`"),
        ("x: [", "not valid YAML: line 1, column 5: "),
        ("{}", "names no model"),
    ],
)
def test_mistakes_of_a_models_file_name_the_option(
    text: str, problem: str, trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(text)
    assert bench("--dataset-name", "trace", "--dataset-path", trace, "--models", path) == 2
    assert capsys.readouterr().err.startswith(f"error: --models {path}: {problem}")
