from __future__ import annotations

from pathlib import Path

import pytest

from prism.errors import ConfigError
from prism.outputs import PLOT_ENDINGS, check_output, make_folder


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    """prism profile and bench ended with a traceback when their measurements were done."""
    check_output("--output", tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    check_output("--output", tmp_path / "file")
    for wrong in (tmp_path, Path("/proc/r.json"), tmp_path / ("a" * 300), tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match=r"^--output .* cannot be written"):
            check_output("--output", wrong)
    for wrong in (tmp_path / "new" / "r.json", tmp_path / "file" / "r.json"):
        with pytest.raises(ConfigError, match=r"^--output .* there is no folder"):
            check_output("--output", wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_endings(tmp_path: Path) -> None:
    check_output("--plot", tmp_path / "x.PNG", PLOT_ENDINGS)
    for name in ("x", "x.unknown", ".png"):
        with pytest.raises(ConfigError, match=r"^--plot .* must end with \.png, \.svg, .* or \.webp"):
            check_output("--plot", tmp_path / name, PLOT_ENDINGS)


def test_folders_for_results_are_made(tmp_path: Path) -> None:
    make_folder("--result-dir", tmp_path / "a" / "b")
    check_output("--result-dir", tmp_path / "a" / "b" / "r.json")
    with pytest.raises(ConfigError, match=r"^--result-dir .* cannot be made"):
        make_folder("--result-dir", Path("/proc/x"))
