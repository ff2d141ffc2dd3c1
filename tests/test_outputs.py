from __future__ import annotations

from pathlib import Path

import pytest

from prism.errors import ConfigError
from prism.outputs import check_output


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    """prism profile and bench ended with a traceback when their measurements were done."""
    check_output(tmp_path / "new" / "r.json")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    check_output(tmp_path / "file")
    for wrong in (tmp_path, tmp_path / "file" / "r.json", Path("/proc/r.json")):
        with pytest.raises(ConfigError, match="cannot be written"):
            check_output(wrong)
