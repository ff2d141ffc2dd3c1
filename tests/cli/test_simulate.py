"""`prism simulate` and `prism plan` as users type them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism.cli.main import main
from prism.sim.cluster import Cluster, Controlling

SMALL = ["--num-models", "6", "--rate", "5", "--duration", "10", "--prompt", "100", "--answer", "20"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return int(ended.value.code or 0)


def test_simulate_is_deterministic_and_replays_what_it_saved(tmp_path: Path) -> None:
    first, again, replayed = (tmp_path / f"{name}.json" for name in ("first", "again", "replayed"))
    saved = str(tmp_path / "t.csv")
    common = ["--devices", "2", "--mode", "prism"]
    assert run("simulate", *SMALL, *common, "--output", str(first), "--save-trace", saved) == 0
    assert run("simulate", *SMALL, *common, "--step", "--output", str(again)) == 0
    assert first.read_text() == again.read_text()
    assert run("simulate", "--trace", saved, *common, "--output", str(replayed)) == 0
    result = json.loads(first.read_text())
    assert {"ttft_attainment", "tpot_attainment", "goodput"} <= set(result)
    assert list(result)[:2] == ["ttft_attainment", "tpot_attainment"] and result["devices"] == 2
    assert json.loads(replayed.read_text())["requests"] == result["requests"]


def test_expected_loads_are_known_if_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = []
    controlled = Cluster.run_controlled

    def run_controlled(cluster: Cluster, *arguments: Any) -> Controlling:
        known.append(arguments[1])
        return controlled(cluster, *arguments)

    monkeypatch.setattr(Cluster, "run_controlled", run_controlled)
    for more in ([], ["--expected-load"]):
        assert run("simulate", *SMALL, *more, "--devices", "2", "--output", str(tmp_path / "o.json")) == 0
    assert known == [False, True]


def test_what_comes_while_it_warms_up_is_served_and_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is measured has seen requests before: models are in memory, or others are."""
    trace, output = tmp_path / "t.csv", tmp_path / "o.json"
    head = "arrival_s,model_key,prompt_tokens,output_tokens\n"
    trace.write_text(head + "0,a,10,5\n20,a,10,5\n30,b,10,5\n")
    given = ["--devices", "1", "--trace", str(trace), "--output", str(output)]
    assert run("simulate", *given, "--warm-up", "20") == 0
    warm = json.loads(output.read_text())
    assert run("simulate", *given) == 0
    cold = json.loads(output.read_text())
    assert (cold["requests"], warm["requests"]) == (3, 2)
    assert [warm["models"][name]["requests"] for name in ("a", "b")] == [1, 1]
    assert warm["goodput"] == pytest.approx(2 / (warm["span_s"] - 20))
    assert warm["models"]["a"]["activations"] == cold["models"]["a"]["activations"] == 1
    assert run("simulate", *given, "--warm-up", "31") != 0
    assert "no request comes as late as that" in capsys.readouterr().err


def test_a_run_may_end_where_it_begins(tmp_path: Path) -> None:
    """All of it was refused at 0 s, and the report divided by its length."""
    trace, output = tmp_path / "t.csv", tmp_path / "o.json"
    trace.write_text("arrival_s,model_key,prompt_tokens,output_tokens\n0,a,10,5\n")
    given = ["--trace", str(trace), "--output", str(output), "--memory", "64MiB"]
    assert run("simulate", "--devices", "1", *given) == 0
    result = json.loads(output.read_text())
    assert (result["no_place"], result["goodput"], result["busy_share"]) == (1, 0.0, 0.0)


def test_simulate_with_models_and_a_placement(tmp_path: Path) -> None:
    models, placement, output = (tmp_path / f"{name}.json" for name in ("models", "placement", "output"))
    models.write_text(json.dumps({f"m{i:02d}": {"shape": "llama-3.2-1b", "ttft": 0.3} for i in range(6)}))
    placement.write_text(json.dumps([["m00", "m01"], ["m02", "m03", "m04"]]))
    given = ["--models", str(models), "--placement", str(placement), "--output", str(output)]
    plot = tmp_path / "p.png"
    assert run("simulate", *SMALL, "--devices", "2", *given, "--plot", str(plot)) == 0
    result = json.loads(output.read_text())
    assert result["unplaced"] == ["m05"] and result["models"]["m05"]["no_place"] > 0
    assert result["models"]["m00"]["slo_ttft_s"] == 0.3 and plot.stat().st_size > 0


@pytest.mark.parametrize("command", [["simulate", "--devices", "1"], ["plan", "--mode", "elastic"]])
@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_what_cannot_be_written_is_told_before_anything_runs(
    command: list[str],
    option: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was told behind a search that may take hours."""
    monkeypatch.setattr("prism.cli.simulate.read_workload", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "new" / "x.png", tmp_path / "file" / "below.png", Path("/proc/x.png")):
        assert run(*command, *SMALL, option, str(path)) == 2
        assert capsys.readouterr().err.startswith(f"error: {option} {path}: ")
    if option == "--plot":
        assert run(*command, *SMALL, option, str(tmp_path / "x.unknown")) == 2
        assert "x.unknown: must end with .png, .svg, .pdf, .jpg or .webp" in capsys.readouterr().err


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "plan.json", tmp_path / "plan.svg"
    given = ["--target", "0.8", "--target-tpot", "0.5", "--most", "4", "--mode", "prism", "--mode", "static"]
    assert run("plan", *SMALL, *given, "--output", str(output), "--plot", str(plot)) == 0
    plans = json.loads(output.read_text())
    assert set(plans) == {"prism", "static"} and plans["prism"]["devices"] >= 1
    assert len(plans["prism"]["placement"]) == plans["prism"]["devices"]
    assert "MODE" in capsys.readouterr().err and plot.stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trace", "/none.csv"], "/none.csv"),
        (["--profile", "/none.json"], "/none.json"),
        (["--memory", "7 apples"], "apples"),
        (["--memory", "lots"], "--memory"),
        (["--memory", "0"], "--memory must hold two slabs"),
        (["--mode", "static", "--expected-load"], "--expected-load"),
        (["--placement", "p.json", "--expected-load"], "--expected-load"),
        (["--models", "/none.json"], "/none.json"),
        (["--duration", "inf"], "--duration must be finite"),
        (["--rate-scale", "inf"], "--rate-scale must be finite"),
        (["--slo-scale", "1e300"], "--slo-scale"),
        (["--memory", "0"], "--memory"),
    ],
)
def test_mistakes_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("simulate", *SMALL, "--devices", "1", *arguments) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("lists", [[], [["m00"], ["m01"]]])
def test_a_placement_has_as_many_devices_as_were_asked_for(
    lists: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without devices the report divided by zero; with others than --devices that was ignored."""
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(lists))
    assert run("simulate", *SMALL, "--devices", "1", "--placement", str(path)) == 2
    assert "--devices is 1" in capsys.readouterr().err


HEAD = "arrival_s,model_key,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("1e300,m,1,1", "line 2: arrival_s"),
        ("1764170000,m,1,1", "line 2: arrival_s"),
        ("0,m,99999999999999999999,1", "line 2: more than"),
    ],
)
def test_impossible_requests_of_a_trace_are_named(
    row: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dates let the controller look every ten seconds for half a century; larger numbers overflowed."""
    path = tmp_path / "trace.csv"
    path.write_text(HEAD + row + "\n")
    assert run("simulate", "--trace", str(path), "--devices", "1") == 2
    assert named in capsys.readouterr().err


def test_a_trace_of_which_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All was refused at time 0, and the report divided by that."""
    path = tmp_path / "trace.csv"
    path.write_text("\ufeff" + HEAD + "0,m,1,1\n", encoding="utf-8")  # as spreadsheets write it
    assert run("simulate", "--trace", str(path), "--devices", "1", "--memory", "64MiB") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["requests"], result["goodput"], result["busy_share"]) == (1, 0, 0)
