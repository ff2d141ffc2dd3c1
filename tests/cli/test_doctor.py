"""`prism doctor`."""

from __future__ import annotations

import pytest

from prism.cli import doctor
from prism.cli.main import main
from prism.errors import DriverError
from prism.memory.host import HostDriver


def test_it_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    output = capsys.readouterr().out
    assert caught.value.code == 0, output
    assert [finding.name for finding in doctor.examine()] == [
        "python",
        "torch",
        "transformers",
        "host memory",
        "host memory driver",
        "gpu",
    ]
    assert "host memory driver: maps and releases pages" in output


def test_what_no_server_runs_without_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DriverError("memfd_create", "EPERM")

    monkeypatch.setattr(HostDriver, "__init__", refuse)
    assert doctor.run_doctor() == 1
    assert "FAIL host memory driver: memfd_create failed: EPERM" in capsys.readouterr().out
