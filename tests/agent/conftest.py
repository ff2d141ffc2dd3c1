from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder for run directories, whose sockets bear no long path; that of `tmp_path` may be one."""
    with tempfile.TemporaryDirectory(prefix="prism-test-") as folder:
        yield Path(folder)
