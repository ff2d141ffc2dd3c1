"""Files that commands write when their work, which may take hours, is done."""

from __future__ import annotations

import os
from pathlib import Path

from prism.errors import ConfigError


def check_output(path: Path) -> None:
    """Make the file's folder. Raises `ConfigError` if the file could not be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error}"]) from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError([f"{path}: cannot be written"])
    if path.exists():
        return
    try:  # root may write everywhere, as `access` says, but not in /proc
        path.touch()
        path.unlink()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be written: {error}"]) from None
