"""The directory in which one server's processes meet: sockets, the configuration, metrics files.

It is private (mode 0700) and locked while its server lives, so that what a killed server left behind is
recognised, and removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from prism.errors import ConfigError

_PREFIX = "prism-"
MAX_PARENT = 70
"""Bytes; a socket's whole path has 107 at most, of which names take 37."""


class RunDir:
    """A fresh directory; `close` removes it."""

    def __init__(self, parent: Path | None = None) -> None:
        """Raises `ConfigError` when there can be none."""
        parent = parent or Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        if len(os.fsencode(parent)) > MAX_PARENT:
            raise ConfigError([f"{parent} is too long for sockets ({MAX_PARENT} bytes); set XDG_RUNTIME_DIR"])
        remove_stale(parent)
        try:
            self._create(parent)
        except OSError as error:
            problem = f"no run directory can be made in {parent}: {error.strerror}; set XDG_RUNTIME_DIR"
            raise ConfigError([problem]) from None

    def _create(self, parent: Path) -> None:
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(fresh / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = fresh.rename(
            parent / fresh.name[1:]
        )  # locked before another server can take it for stale
        self.metrics.mkdir(mode=0o700)

    @property
    def store_socket(self) -> Path:
        """Where packed weights are handed out as file descriptors."""
        return self.path / "store.sock"

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """Metrics of all processes."""
        return self.path / "metrics"

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_stale(parent: Path) -> None:
    """Remove directories of this user whose server is gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if path.stat().st_uid != os.getuid() or not (path / "lock").exists():
                continue
            lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
