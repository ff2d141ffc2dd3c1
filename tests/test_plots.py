"""The plots of benchmarks' folders."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPT = runpy.run_path(str(BENCHMARKS / "plot.py"))


@pytest.mark.parametrize("name", SCRIPT["PLOTS"])
def test_a_folders_plot_can_be_drawn_from_its_results(name: str, tmp_path: Path) -> None:
    SCRIPT["draw"](name, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    committed = BENCHMARKS / name / "plot.png"
    assert committed.stat().st_size < 100_000
    assert "](plot.png)" in (BENCHMARKS / name / "README.md").read_text()
