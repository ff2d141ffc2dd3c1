"""`prism ps`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prism.cli.table import print_models
from prism.types import GiB, MiB

LONG_NAME = "Qwen/Qwen2.5-7B"


def entry(name: str, worker: str = "worker-0", **changes: Any) -> dict[str, Any]:
    report = {
        "model": name,
        "state": "active",
        "weights_bytes": 15 * GiB,
        "kv_used_bytes": 3 * MiB // 2,
        "kv_cached_bytes": 0,
        "kv_slab_bytes": 96 * MiB,
        "kv_host_bytes": 0,
        "kv_floor_bytes": 0,
        "kv_limit_bytes": None,
        "num_running": 12,
        "num_waiting": 3,
        "estimated_wait": 1.25,
        "load_progress": 1.0,
        "idle_seconds": 0.0,
        "num_activations": 1,
        "max_len": 2048,
        "pinned": False,
        "error": None,
    }
    return at(name, worker, report | changes)


def at(name: str, worker: str, report: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    still = {"homes": [worker], "elsewhere": [], "migration": None}
    return {"model": name, "worker": worker, "report": report} | still | fields


def answer(*models: dict[str, Any]) -> dict[str, Any]:
    device = {
        "worker": "worker-0",
        "device": "cuda:0",
        "incarnation": 1,
        "slab_bytes": 32 * MiB,
        "num_slabs": 4096,
        "num_free_slabs": 2,
        "registered_bytes": 0,
        "registration_error": None,
        "kv_host_bytes": 0,
        "kv_host_error": None,
        "is_silent": False,
    }
    placement = {"pressures": {}, "crowded": [], "infeasible": [], "shut_out": []}
    return {
        "epoch": 1,
        "devices": [device],
        "models": list(models),
        "placement": placement,
        "tenants": [],
    }


def lines(capsys: pytest.CaptureFixture[str], *models: dict[str, Any]) -> list[str]:
    print_models(answer(*models), as_json=False)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    limited = entry("b", kv_limit_bytes=2 * GiB, num_running=0, idle_seconds=61.4, pinned=True)
    assert lines(capsys, entry(LONG_NAME), limited) == [
        "worker-0 on cuda:0: 128G in slabs of 32M, 64M free",
        "MODEL            STATE           WEIGHTS  KV USED  CACHED  HELD  HOST  LIMIT  RUN  WAIT   ETA  IDLE",
        "Qwen/Qwen2.5-7B  active              15G     1.5M       0   96M     0      -   12     3  1.2s    0s",
        "b                active, pinned      15G     1.5M       0   96M     0  2048M    0     3  1.2s   61s",
    ]


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_nothing_is_cut_in_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    name = "a" * 128
    table = lines(capsys, entry(name), entry("b"))
    assert len(table) == 4
    assert table[2].startswith(f"{name}  active") and table[2].endswith(" 0s")
    assert "…" not in "".join(table)


def test_workers_are_shown_when_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    away = at("b", "worker-1", None)
    table = lines(capsys, entry("a"), away)
    assert table[1].split()[:3] == ["MODEL", "WORKER", "STATE"]
    assert table[3].split() == ["b", "worker-1", "away"]
    assert "WORKER" not in lines(capsys, entry("a"))[1]


def test_the_worker_is_shown_though_the_other_has_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    both = answer(entry("a"))
    both["devices"].append(both["devices"][0] | {"worker": "worker-1"})
    print_models(both, as_json=False)
    assert "WORKER" in capsys.readouterr().out.splitlines()[2]


def test_a_worker_that_does_not_report_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    stale = answer(entry("a"))
    stale["devices"][0]["is_silent"] = True
    print_models(stale, as_json=False)
    assert capsys.readouterr().out.splitlines()[0].endswith("; has not reported for some time")


def test_a_migration_is_shown_at_both_ends(capsys: pytest.CaptureFixture[str]) -> None:
    there = {"worker": "worker-1", "report": entry("a", state="loading", load_progress=0.5)["report"]}
    moving = {"source": "worker-0", "target": "worker-1", "phase": "loading"}
    source = entry("a")["report"]
    table = lines(capsys, at("a", "worker-0", source, elsewhere=[there], migration=moving))
    assert table[2].startswith("a      worker-0  active, moving to worker-1 ")
    assert table[3].startswith("a      worker-1  loading 50%, arriving ")
    merging = {"source": "worker-1", "target": None, "phase": "draining"}
    table = lines(capsys, at("a", "worker-0", source, elsewhere=[there], migration=merging))
    assert "moving" not in table[2] and "loading 50%, leaving" in table[3]


def test_models_without_room_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    of_all = answer(entry("a"))
    of_all["placement"] |= {"crowded": ["a"], "infeasible": ["b"], "shut_out": ["c"]}
    print_models(of_all, as_json=False)
    crowded, shut_out, infeasible = capsys.readouterr().out.splitlines()[-3:]
    assert crowded.startswith("a: takes turns") and infeasible == "b: fits no device"
    assert shut_out == "c: has no room beside pinned models"


def test_progress_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    loading = entry("a", state="loading", load_progress=0.456)
    failed = entry("b", state="failed", error="/m/b/model.safetensors: [truncated]")
    table = lines(capsys, loading, failed)
    assert "loading 46%" in table[2]
    assert table[2].endswith(" -")
    assert table[4] == "b: /m/b/model.safetensors: [truncated]"


def test_registered_memory_and_what_went_wrong_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    of_all = answer(entry("a"))
    of_all["devices"][0] |= {"registered_bytes": 3 * GiB, "registration_error": "a: refused"}
    print_models(of_all, as_json=False)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(
        "64M free, 3072M of host memory registered; not all could be registered: a: refused"
    )


def test_kv_in_host_memory_and_what_went_wrong_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    of_all = answer(entry("a", kv_host_bytes=12 * MiB))
    of_all["devices"][0] |= {"kv_host_bytes": 64 * MiB, "kv_host_error": "refused"}
    print_models(of_all, as_json=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("64M of host memory for KV; no more could be taken for KV: refused")
    assert shown[1].split().index("HOST") - shown[1].split().index("HELD") == 1
    assert " 12M " in shown[2]


def test_tenants_are_shown_where_there_are_keys(capsys: pytest.CaptureFixture[str]) -> None:
    of_all = answer(entry("a"))
    counts = {"num_running": 3, "num_waiting": 200, "prompt_tokens": 12345, "decoded_tokens": 678}
    of_all["tenants"] = [{"tenant": "search", "weight": 2.5, "device_seconds": 9.87, **counts}]
    print_models(of_all, as_json=False)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()[-2:]] == [
        "TENANT  WEIGHT  RUN  WAIT  PROMPT TOKENS  OUTPUT TOKENS  DEVICE",
        "search     2.5    3   200          12345            678    9.9s",
    ]


def test_json_is_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    print_models(answer(entry("a")), as_json=True)
    assert json.loads(capsys.readouterr().out) == answer(entry("a"))
