"""Where a buffer's bytes go on the device."""

from __future__ import annotations

from typing import NamedTuple

from prism.types import Address, Bytes


class Places(NamedTuple):
    """Slabs that take a buffer's bytes in this order."""

    slabs: tuple[Address, ...]
    slab_bytes: Bytes
