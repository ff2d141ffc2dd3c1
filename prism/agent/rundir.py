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

_PREFIX = "prism-"


class RunDir:
    """A fresh directory; `close` removes it."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        remove_stale(parent)
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
