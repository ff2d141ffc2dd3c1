"""Benchmarks of GPUs rehearse on the CPU, so that they still run when there is a GPU again."""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.server.harness import free_ports

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of a folder, which finds its neighbours as when it is run."""
    path = BENCHMARKS / name / "run.py"
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    spec = util.spec_from_file_location(f"rehearsal of {name}", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rehearse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    def run(name: str, *options: str) -> Any:
        script = load(name, monkeypatch)
        if hasattr(script, "PORT"):
            for key, port in zip(("PORT", "ADMIN"), free_ports(2), strict=True):
                monkeypatch.setattr(script, key, port)
        output = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [name, "--rehearse", "--output", str(output), *options])
        script.main()
        return json.loads(output.read_text())

    return run


def test_slabs_that_change_their_owner(rehearse: Any) -> None:
    found = rehearse("elastic", "--repeats", "1", "--turns", "2")
    assert [len(found[mode][0]["tok_s"]) for mode in ("fixed", "elastic")] == [2, 2]
    assert found["elastic_over_fixed"] > 0


def test_the_first_light(rehearse: Any) -> None:
    found = rehearse("first-light", "--memory", "512MiB")
    assert {load["model"] for load in found["activations"]} == {"1b", "8b"}
    assert found["handover"]["neighbour_gap_ms"]["median"] > 0


def test_activations(rehearse: Any) -> None:
    found = rehearse("activation", "--memory", "512MiB", "--runs", "1")
    assert found["four_1b_at_once_s"]["runs"] == 4
    assert any(" active after " in line for line in found["log"])


def test_a_model_through_the_server(rehearse: Any) -> None:
    (found,) = rehearse("serving", "--requests", "20", "--gateways", "2", "--batches", "1,8")
    assert found["decode_8"]["step_ms"] > 0
    assert found["offline"]["pieces"] == 20 * 16
