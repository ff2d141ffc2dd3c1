"""`prism doctor`; what it says of GPUs is in test_doctor_gpu.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism.cli import doctor
from prism.cli.main import main
from prism.errors import DriverError
from prism.memory import available
from prism.memory.host import HostDriver
from prism.types import Bytes, MiB


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "GPU_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setenv("COLUMNS", "1000")


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
    assert "note gpu: no NVIDIA device, or its driver is not loaded" in output


def test_what_no_server_runs_without_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise DriverError("memfd_create", "EPERM")

    monkeypatch.setattr(HostDriver, "__init__", refuse)
    assert doctor.run_doctor() == 1
    assert "FAIL host memory driver: memfd_create failed: EPERM; no server runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "version", "line"),
    [
        ("torch", None, "FAIL torch: not installed: no worker starts, whatever its kind"),
        ("transformers", None, "FAIL transformers: not installed; no server runs without 5"),
        ("transformers", "4.57.1", "FAIL transformers: 4.57.1; no server runs without 5"),
    ],
)
def test_a_package_that_lacks_is_told_with_its_cost(
    package: str,
    version: str | None,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A doctor without transformers ended with a traceback."""
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == package else real(name))
    assert doctor.run_doctor() == 1
    assert line in capsys.readouterr().out.splitlines()


def test_little_host_memory_is_told_with_its_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "available_memory", lambda: Bytes(512 * MiB))
    assert doctor.run_doctor() == 0
    line = "note host memory: 0.5 GiB available: models with larger weights do not load"
    assert line in capsys.readouterr().out.splitlines()
