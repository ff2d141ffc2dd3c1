from __future__ import annotations

from pathlib import Path

from prism.memory.available import available_memory
from prism.types import GiB, MiB


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path, groups: str = "0::/\n") -> Path:
    write(root / "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    write(root / "proc/self/cgroup", groups)
    return root


def group(root: Path, path: str, limit: str, usage: int, unused_cache: int = 0) -> None:
    directory = root / "sys/fs/cgroup" / path
    write(directory / "memory.max", f"{limit}\n")
    write(directory / "memory.current", f"{usage}\n")
    write(directory / "memory.stat", f"anon 5\ninactive_file {unused_cache}\n")


def test_this_machine_has_some() -> None:
    assert available_memory() > 0


def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path)) == 4 * GiB


def test_a_limit_anywhere_above_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/pod/main\n")
    group(root, "pod/main", "max", 300 * MiB)
    group(root, "pod", str(GiB), 600 * MiB, unused_cache=100 * MiB)
    assert available_memory(root) == 524 * MiB
    group(root, "pod/main", str(400 * MiB), 300 * MiB)
    assert available_memory(root) == 100 * MiB


def test_version_1_limits_count_too(tmp_path: Path) -> None:
    root = machine(tmp_path, "4:cpu,memory:/job\n0::/\n")
    directory = root / "sys/fs/cgroup/memory"
    for place, limit in (("job", 2 * GiB), (".", 9223372036854771712)):
        write(directory / place / "memory.limit_in_bytes", str(limit))
        write(directory / place / "memory.usage_in_bytes", str(GiB))
        write(directory / place / "memory.stat", "inactive_file 0\n")
    assert available_memory(root) == GiB


def test_over_the_limit_there_is_none(tmp_path: Path) -> None:
    root = machine(tmp_path)
    group(root, ".", str(MiB), 2 * MiB)
    assert available_memory(root) == 0
