"""How much memory this process may still take: the machine's and that of every control group above it.

A memory file that outgrows either is not refused: the kernel kills a process instead. So it is asked first.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prism.types import Bytes

_UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63."""


def available_memory(root: Path = Path("/")) -> Bytes:
    """Bytes that can be taken without swapping or passing a limit; `root` is where /proc and /sys are."""
    return Bytes(max(0, min([_of_machine(root), *_of_groups(root)])))


def _of_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return _UNLIMITED


def _of_groups(root: Path) -> Iterator[int]:
    """Room in each limited control group from the process's own up to the root, both cgroup versions."""
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = mount / group.strip("/")
        for directory in (own, *own.parents):
            yield _room(directory / limit, directory / usage, directory / "memory.stat")
            if directory == mount:
                break


def _room(limit: Path, usage: Path, stat: Path) -> int:
    """Limit less usage, where unused file cache counts as free; unlimited if there is no such group."""
    try:
        text = limit.read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED:
            return _UNLIMITED
        reclaimable = sum(
            int(value)
            for name, value in (line.split() for line in stat.read_text().splitlines())
            if name == "inactive_file"
        )
        return int(text) - int(usage.read_text()) + reclaimable
    except OSError:
        return _UNLIMITED
