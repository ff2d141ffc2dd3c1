"""What this system's memory can do."""

from __future__ import annotations

import platform
from pathlib import Path

CAN_TOUCH = tuple(map(int, platform.release().split(".")[:2])) >= (5, 14)
"""Pages can be looked up all at once."""
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
HAS_LARGE_PAGES = _LARGE_PAGES.exists() and "[never]" not in _LARGE_PAGES.read_text()
"""Memory files may have them."""
