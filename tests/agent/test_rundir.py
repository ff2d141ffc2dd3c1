from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from prism.agent.rundir import RunDir, remove_stale
from prism.errors import ConfigError


def leave_behind(parent: Path) -> Path:
    """What a killed server leaves: a directory whose lock nobody holds."""
    path = parent / "prism-stale"
    (path / "metrics").mkdir(parents=True)
    (path / "lock").touch()
    (path / "store.sock").touch()
    return path


def test_it_is_private_and_goes_with_its_server(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.path.parent == tmp_path and run_dir.path.name.startswith("prism-")
    for path in (run_dir.path, run_dir.metrics):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir.path / "lock").stat().st_mode) == 0o600
    run_dir.config.touch()
    run_dir.close()
    assert list(tmp_path.iterdir()) == []


def test_only_what_a_dead_server_left_is_removed(tmp_path: Path) -> None:
    stale = leave_behind(tmp_path)
    foreign = tmp_path / "prism-notes"
    foreign.mkdir()
    living = RunDir(tmp_path)
    assert not stale.exists()
    other = RunDir(tmp_path)
    assert living.path.exists() and foreign.exists()
    living.close()
    other.close()


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    run_dir = RunDir()
    assert run_dir.path.parent == tmp_path
    run_dir.close()


def test_a_directory_is_never_seen_without_its_lock(tmp_path: Path) -> None:
    """Two servers that started at once: one took the other's new directory for stale and removed it."""
    is_over = threading.Event()

    def clean() -> None:
        while not is_over.is_set():
            remove_stale(tmp_path)

    threads = [threading.Thread(target=clean) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            run_dir = RunDir(tmp_path)
            assert (run_dir.path / "lock").exists()
            run_dir.close()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_an_impossible_place_is_a_clear_error(tmp_path: Path) -> None:
    """A long path, or one that is not there, ended the server with a traceback."""
    with pytest.raises(ConfigError, match="too long for sockets"):
        RunDir(tmp_path / ("x" * 80))
    with pytest.raises(ConfigError, match="No such file"):
        RunDir(tmp_path / "no")
