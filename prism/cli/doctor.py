"""Checks what Prism needs of a machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console

from prism.errors import DriverError
from prism.types import Bytes, MiB

TESTED = {"3.11": "2.13", "3.12": "2.11"}
"""Python and torch versions that were run together."""


GPU_PACKAGES = ("triton", "cuda-bindings")


class Finding(NamedTuple):
    """One line of the report. `is_fatal` findings make the status 1."""

    name: str
    is_good: bool
    text: str
    is_fatal: bool = False


def run_doctor() -> int:
    """Print all findings; 1 if something is missing without which no server runs."""
    console = Console()
    status = 0
    for finding in examine():
        mark = (
            "[green]ok  [/]" if finding.is_good else "[red]FAIL[/]" if finding.is_fatal else "[yellow]note[/]"
        )
        console.print(f"{mark} {finding.name}: {finding.text}", highlight=False)
        if finding.is_fatal and not finding.is_good:
            status = 1
    return status


def examine() -> Iterator[Finding]:
    """All checks."""
    checks: tuple[Callable[[], Finding], ...] = (_python, _torch, _transformers, _host_memory, _driver, _gpu)
    for check in checks:
        yield (finding := check())
    if finding.is_good:  # the last one: there is a GPU
        from prism.cli.doctor_gpu import examine_gpus

        for name, is_good, text in examine_gpus():
            yield Finding(name, is_good, text)


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", version.rpartition(".")[0] in TESTED, f"{version}; run with 3.11 and 3.12")


def _torch() -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", False, "not installed", is_fatal=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tested = TESTED.get(python)
    good = tested is not None and version.startswith(tested)
    return Finding("torch", good, version if good else f"{version}; tested with {tested} on Python {python}")


def _transformers() -> Finding:
    version = importlib.metadata.version("transformers")
    return Finding("transformers", int(version.split(".")[0]) >= 5, version, is_fatal=True)


def _host_memory() -> Finding:
    from prism.memory.available import available_memory

    available = available_memory()
    return Finding("host memory", available > 2**30, f"{available / 2**30:.1f} GiB available")


def _driver() -> Finding:
    """Creates, maps, releases 2 MiB and looks whether they really went."""
    from prism.memory.host import HostDriver

    try:
        driver = HostDriver(Bytes(2 * MiB))
        address = driver.reserve(Bytes(2 * MiB))
        handle = driver.create(Bytes(2 * MiB))
        driver.map(address, handle)
        driver.unmap(address, Bytes(2 * MiB))
        driver.release(handle)
        driver.unreserve(address, Bytes(2 * MiB))
        driver.close()
    except DriverError as error:
        return Finding("host memory driver", False, str(error), is_fatal=True)
    return Finding("host memory driver", True, "maps and releases pages")


def _gpu() -> Finding:
    if not os.path.exists("/dev/nvidiactl"):
        return Finding("gpu", False, "no NVIDIA device; models run on the CPU")
    missing = []
    for package in GPU_PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(
            "gpu", False, f"found, but {', '.join(missing)} missing: pip install 'prism-serve[gpu]'"
        )
    return Finding("gpu", True, "NVIDIA device and packages found")
