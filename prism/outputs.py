"""Files that commands write when their work, which may take hours, is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prism.errors import ConfigError

REPORT_ENDINGS = (".html", ".htm")
PLOT_ENDINGS = (".png", ".svg", ".pdf", ".jpg", ".webp")


def check_output(option: str, path: Path, endings: Sequence[str] = ()) -> None:
    """Raises `ConfigError` that names the option if the file could not be written there.

    `endings` are those that are possible; by default all are.
    """
    if endings and path.suffix.lower() not in endings:
        raise ConfigError([f"{option} {path}: must end with {', '.join(endings[:-1])} or {endings[-1]}"])
    try:
        if not path.parent.is_dir():
            raise ConfigError([f"{option} {path}: there is no folder {path.parent}"])
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError([f"{option} {path}: cannot be written"])
        if not path.exists():  # root may write everywhere, as `access` says, but not in /proc
            path.touch()
            path.unlink()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        raise ConfigError([f"{option} {path}: cannot be written: {error}"]) from None


def make_folder(option: str, folder: Path) -> None:
    """A folder for results, if it is not there. Raises `ConfigError` that names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError([f"{option} {folder}: cannot be made: {error}"]) from None
