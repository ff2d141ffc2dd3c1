"""Checks what Prism needs of a machine, and says of what is missing what that costs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from prism.errors import DriverError
from prism.types import Bytes, MiB

TESTED = {"3.11": "2.13", "3.12": "2.11"}
"""Python and torch versions that were run together."""

GPU_DEVICE = Path("/dev/nvidiactl")
GPU_DRIVER = Path("/proc/driver/nvidia/version")
GPU_PACKAGES = {"triton": "compiles the kernels", "cuda-bindings": "maps the GPU's memory"}
GPU_WORKER = "prism.worker.cuda_device"
NO_GPU = "no worker starts on a GPU, models run on CPUs only"


class Finding(NamedTuple):
    """One line of the report. `is_fatal` findings make the status 1."""

    name: str
    is_good: bool
    text: str
    is_fatal: bool = False


def run_doctor() -> int:
    """Print all findings; 1 if something is missing without which no server runs, or a GPU that is there."""
    console = Console()
    status = 0
    for finding in examine():
        mark = (
            "[green]ok  [/]" if finding.is_good else "[red]FAIL[/]" if finding.is_fatal else "[yellow]note[/]"
        )
        line = f"{mark} {finding.name}: {escape(finding.text)}"
        console.print(line, highlight=False, soft_wrap=True)
        if finding.is_fatal and not finding.is_good:
            status = 1
    return status


def examine() -> Iterator[Finding]:
    """All checks; GPUs are measured if a worker could open them."""
    checks: tuple[Callable[[], Finding], ...] = (_python, _torch, _transformers, _host_memory, _driver)
    for check in checks:
        yield check()
    if not GPU_DEVICE.exists():
        text = f"no NVIDIA device, or its driver is not loaded (no {GPU_DEVICE}); models run on the CPU"
        yield Finding("gpu", False, text)
        return
    needs = (_gpu(), _gpu_packages(), _gpu_torch())
    yield from needs
    if all(finding.is_good for finding in needs):
        from prism.cli.doctor_gpu import examine_gpus

        yield from examine_gpus()


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", version.rpartition(".")[0] in TESTED, f"{version}; run with 3.11 and 3.12")


def _torch() -> Finding:
    version = _version("torch")
    if version is None:
        return Finding("torch", False, "not installed: no worker starts, whatever its kind", is_fatal=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    tested = TESTED.get(python)
    good = tested is not None and version.startswith(tested)
    return Finding("torch", good, version if good else f"{version}; tested with {tested} on Python {python}")


def _transformers() -> Finding:
    version = _version("transformers")
    if version is None or int(version.split(".")[0]) < 5:
        text = f"{version or 'not installed'}; no server runs without 5"
        return Finding("transformers", False, text, is_fatal=True)
    return Finding("transformers", True, version)


def _host_memory() -> Finding:
    from prism.memory.available import available_memory

    available = available_memory()
    good = available > 2**30
    text = f"{available / 2**30:.1f} GiB available"
    return Finding("host memory", good, text if good else f"{text}: models with larger weights do not load")


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
        return Finding("host memory driver", False, f"{error}; no server runs", is_fatal=True)
    return Finding("host memory driver", True, "maps and releases pages")


def _gpu() -> Finding:
    """The driver: its kernel module, and the library by which programs reach it."""
    module = _module_version() or "of unknown version"
    cuda = _driver_cuda()
    if cuda is None:
        text = (
            f"NVIDIA driver {module} without libcuda.so.1: {NO_GPU}; a container gets it by NVIDIA's toolkit"
        )
        return Finding("gpu", False, text, is_fatal=True)
    return Finding("gpu", True, f"NVIDIA driver {module} for CUDA {cuda}")


def _module_version() -> str | None:
    """What the kernel module calls itself; None where it does not say, as in some containers."""
    try:
        found = re.search(r"NVRM version:.*?\s(\d+(\.\d+)+)\s", GPU_DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found and found[1]


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver knows; None without its library."""
    number = ctypes.c_int()
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if code else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _gpu_packages() -> Finding:
    """Those of the extra `gpu`, imported as a worker does."""
    versions = {package: _version(package) for package in GPU_PACKAGES}
    lacks = [f"{package}, which {GPU_PACKAGES[package]}" for package in versions if not versions[package]]
    if lacks:
        text = f"without {', and '.join(lacks)}, {NO_GPU}: pip install 'prism-serve[gpu]'"
        return Finding("gpu packages", False, text, is_fatal=True)
    text = ", ".join(f"{package} {version}" for package, version in versions.items())
    try:
        importlib.import_module(GPU_WORKER)
    except Exception as error:  # whatever a package raises would end a worker, too
        return Finding("gpu packages", False, f"{text} cannot be imported ({error}): {NO_GPU}", is_fatal=True)
    return Finding("gpu packages", True, text)


def _gpu_torch() -> Finding:
    """Whether torch opens a GPU; if not, its words tell of a driver too old, or that none is visible."""
    about = f"{_version('torch')}"
    try:
        import torch

        if torch.version.cuda is None:
            raise RuntimeError("it is built without CUDA; install a build for the driver's CUDA")
        about = f"{about}, built for CUDA {torch.version.cuda},"
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever torch raises would end a worker, too
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = str(error) if visible is None else f"{error}; CUDA_VISIBLE_DEVICES is '{visible}'"
        return Finding("gpu torch", False, f"{about} opens no GPU ({reason}): {NO_GPU}", is_fatal=True)
    return Finding("gpu torch", True, f"{about} opens a GPU")


def _version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
