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


def test_it_is_private_and_goes_with_its_server(short_path: Path) -> None:
    run_dir = RunDir(short_path)
    assert run_dir.path.parent == short_path and run_dir.path.name.startswith("prism-")
    for path in (run_dir.path, run_dir.metrics):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir.path / "lock").stat().st_mode) == 0o600
    run_dir.config.touch()
    run_dir.close()
    assert list(short_path.iterdir()) == []


def test_only_what_a_dead_server_left_is_removed(short_path: Path) -> None:
    stale = leave_behind(short_path)
    foreign = short_path / "prism-notes"
    foreign.mkdir()
    living = RunDir(short_path)
    assert not stale.exists()
    other = RunDir(short_path)
    assert living.path.exists() and foreign.exists()
    living.close()
    other.close()


def test_the_environment_says_where(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    run_dir = RunDir()
    assert run_dir.path.parent == short_path
    run_dir.close()


def test_a_directory_is_never_seen_without_its_lock(short_path: Path) -> None:
    """Two servers that started at once: one took the other's new directory for stale and removed it."""
    is_over = threading.Event()

    def clean() -> None:
        while not is_over.is_set():
            remove_stale(short_path)

    threads = [threading.Thread(target=clean) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            run_dir = RunDir(short_path)
            assert (run_dir.path / "lock").exists()
            run_dir.close()
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def test_an_impossible_place_is_a_clear_error(short_path: Path) -> None:
    """A long path, or one that is not there, ended the server with a traceback."""
    with pytest.raises(ConfigError, match="too long for sockets"):
        RunDir(short_path / ("x" * 80))
    with pytest.raises(ConfigError, match="No such file"):
        RunDir(short_path / "no")
