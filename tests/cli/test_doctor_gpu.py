"""`prism doctor` on a machine with an NVIDIA GPU: driver, torch's view of it and measurements are faked."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from prism.cli import doctor
from prism.errors import DriverError
from prism.memory.failing import FailingDriver
from prism.memory.host import HostDriver
from prism.types import Bytes, GiB, MiB

PROPRIETARY = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16-I3-B03)
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
NO_GPU = "no worker starts on a GPU, models run on CPUs only"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12080)."
WELL = [
    "ok   gpu: NVIDIA driver 570.86.15 for CUDA 12.8",
    "ok   gpu packages: triton 3.6.0, cuda-bindings 13.0.3",
    "ok   gpu torch: 2.13.0, built for CUDA 12.8, opens a GPU",
]
MEASURED = [f"ok   cuda:0 {name}: {name} is well" for name in ("device", "mapping", "link", "kernels")]


class Machine:
    """One with a GPU that Prism can use, until a test breaks something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.patch = monkeypatch.setattr
        self.versions: dict[str, str | None] = {
            "torch": "2.13.0",
            "transformers": "5.17.0",
            "triton": "3.6.0",
            "cuda-bindings": "13.0.3",
        }
        self.module_version = root / "version"
        self.module_version.write_text(OPEN)
        (root / "nvidiactl").touch()
        self.patch(doctor, "GPU_DEVICE", root / "nvidiactl")
        self.patch(doctor, "GPU_DRIVER", self.module_version)
        self.patch(doctor, "_version", self.versions.get)
        self.set_libcuda(12080)
        self.patch(torch.version, "cuda", "12.8")
        self.patch(torch.cuda, "init", lambda: None)
        self.patch(torch.cuda, "device_count", lambda: 1)
        self.patch(torch.cuda, "set_device", lambda _: None)
        monkeypatch.setitem(sys.modules, doctor.GPU_WORKER, ModuleType(doctor.GPU_WORKER))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("COLUMNS", "1000")

    def set_libcuda(self, version: int | None) -> None:
        """None: there is none."""

        def version_into(number: ctypes.c_int) -> int:
            number.value = version or 0
            return 0

        def load(name: str) -> object:
            if version is None:
                raise OSError(f"{name}: cannot open shared object file")
            return SimpleNamespace(cuDriverGetVersion=version_into)

        fake = SimpleNamespace(CDLL=load, c_int=ctypes.c_int, byref=lambda number: number)
        self.patch(doctor, "ctypes", fake)

    def report(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
        """The exit status, and what is said of the GPU."""
        status = doctor.run_doctor()
        lines = capsys.readouterr().out.splitlines()
        return status, [line for line in lines if line[5:].startswith(("gpu", "cuda"))]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """doctor_gpu.py, without the CUDA bindings."""
    bindings: Any = ModuleType("prism.memory.cuda")
    bindings.CudaDriver = None
    monkeypatch.setitem(sys.modules, "prism.memory.cuda", bindings)
    earlier = sys.modules.pop("prism.cli.doctor_gpu", None)
    yield importlib.import_module("prism.cli.doctor_gpu")
    del sys.modules["prism.cli.doctor_gpu"]
    if earlier is not None:
        sys.modules["prism.cli.doctor_gpu"] = earlier


Check = Callable[[int], tuple[bool, str]]


def fake_check(name: str, result: tuple[bool, str] | Exception | None = None) -> Check:
    def check(index: int) -> tuple[bool, str]:
        if isinstance(result, Exception):
            raise result
        return result or (True, f"{name} is well")

    check.__name__ = f"_{name}"
    return check


@pytest.fixture
def checks(measuring: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the measurements find: those not named are well."""

    def set_checks(**results: tuple[bool, str] | Exception) -> None:
        for name in ("device", "mapping", "link", "kernels"):
            monkeypatch.setattr(measuring, f"_{name}", fake_check(name, results.get(name)))

    set_checks()
    return set_checks


@pytest.mark.usefixtures("checks")
def test_all_is_well(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.report(capsys) == (0, [*WELL, *MEASURED])


@pytest.mark.usefixtures("checks")
def test_every_gpu_is_measured(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.patch(torch.cuda, "device_count", lambda: 2)
    second = [line.replace("cuda:0", "cuda:1") for line in MEASURED]
    assert machine.report(capsys) == (0, [*WELL, *MEASURED, *second])


def test_a_torch_without_cuda_is_a_failure(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """Doctor said ok, since there was a device and the packages were installed."""
    machine.versions["torch"] = "2.13.0+cpu"
    machine.patch(torch.version, "cuda", None)
    reason = "it is built without CUDA; install a build for the driver's CUDA"
    line = f"FAIL gpu torch: 2.13.0+cpu opens no GPU ({reason}): {NO_GPU}"
    assert machine.report(capsys) == (1, [*WELL[:2], line])


def test_a_driver_too_old_for_torch_is_a_failure(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doctor said ok, and which CUDA the driver has and torch wants it did not say."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    line = f"FAIL gpu torch: 2.13.0, built for CUDA 13.0, opens no GPU ({TOO_OLD}): {NO_GPU}"
    assert machine.report(capsys) == (1, [*WELL[:2], line])


def test_no_visible_device_is_a_failure(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doctor said ok, and measured none."""

    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    reason = "No CUDA GPUs are available; CUDA_VISIBLE_DEVICES is ''"
    line = f"FAIL gpu torch: 2.13.0, built for CUDA 12.8, opens no GPU ({reason}): {NO_GPU}"
    assert machine.report(capsys) == (1, [*WELL[:2], line])


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        (["triton"], "triton, which compiles the kernels"),
        (["cuda-bindings"], "cuda-bindings, which maps the GPU's memory"),
        (
            ["triton", "cuda-bindings"],
            "triton, which compiles the kernels, and cuda-bindings, which maps the GPU's memory",
        ),
    ],
)
def test_missing_packages_are_told_with_their_cost(
    machine: Machine, capsys: pytest.CaptureFixture[str], missing: list[str], what: str
) -> None:
    """Only names were, and of the command to install them the extra was lost, as markup."""
    machine.versions.update(dict.fromkeys(missing))
    line = f"FAIL gpu packages: without {what}, {NO_GPU}: pip install 'prism-serve[gpu]'"
    assert machine.report(capsys) == (1, [WELL[0], line, WELL[2]])


def test_packages_that_no_worker_can_import_are_a_failure(
    machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, doctor.GPU_WORKER, None)
    status, lines = machine.report(capsys)
    assert status == 1
    assert [lines[0], lines[2]] == [WELL[0], WELL[2]]
    assert lines[1].startswith("FAIL gpu packages: triton 3.6.0, cuda-bindings 13.0.3 cannot be imported (")
    assert lines[1].endswith(f"): {NO_GPU}")


def test_a_driver_without_its_library_is_a_failure(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.set_libcuda(None)
    text = f"NVIDIA driver 570.86.15 without libcuda.so.1: {NO_GPU}; a container gets it by NVIDIA's toolkit"
    assert machine.report(capsys) == (1, [f"FAIL gpu: {text}", *WELL[1:]])


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("text", "version"), [(PROPRIETARY, "535.129.03"), (OPEN, "570.86.15"), (None, "of unknown version")]
)
def test_the_drivers_version(
    machine: Machine, capsys: pytest.CaptureFixture[str], text: str | None, version: str
) -> None:
    """Of both kernel modules, and where /proc has none."""
    machine.module_version.unlink() if text is None else machine.module_version.write_text(text)
    status, lines = machine.report(capsys)
    assert (status, lines[0]) == (0, f"ok   gpu: NVIDIA driver {version} for CUDA 12.8")


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("device", RuntimeError("CUDA error: uncorrectable ECC error encountered")),
        ("mapping", DriverError("cuMemCreate", "CUDA_ERROR_NOT_SUPPORTED")),
        ("kernels", RuntimeError("Failed to find C compiler")),
        ("kernels", subprocess.CalledProcessError(1, ["gcc"])),
    ],
)
def test_a_gpu_that_prism_cannot_use_is_a_failure(
    machine: Machine,
    checks: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    check: str,
    error: Exception,
) -> None:
    """It was a note, or a traceback if a compiler failed; the other measurements are made all the same."""
    checks(**{check: error})
    line = f"FAIL cuda:0 {check}: {error}; no worker starts on this GPU"
    expected = [line if f" {check}: " in well else well for well in MEASURED]
    assert machine.report(capsys) == (1, [*WELL, *expected])


def test_without_registered_memory_prism_is_slower(
    machine: Machine, checks: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    checks(link=DriverError("cuMemHostRegister", "CUDA_ERROR_NOT_PERMITTED"))
    status, lines = machine.report(capsys)
    cost = "without registered memory weights load half as fast or slower, and no KV waits in host memory"
    line = f"note cuda:0 link: cuMemHostRegister failed: CUDA_ERROR_NOT_PERMITTED; {cost}"
    assert (status, lines) == (0, [*WELL, *MEASURED[:2], line, MEASURED[3]])


@pytest.mark.usefixtures("checks")
def test_a_gpu_that_cannot_be_chosen_hides_no_other(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ended doctor with a traceback."""

    def set_device(index: int) -> None:
        if index == 0:
            raise RuntimeError("CUDA-capable device(s) is/are busy")

    machine.patch(torch.cuda, "device_count", lambda: 2)
    machine.patch(torch.cuda, "set_device", set_device)
    status, lines = machine.report(capsys)
    assert status == 1
    assert "FAIL cuda:0 device: CUDA-capable device(s) is/are busy; no worker starts on this GPU" in lines
    assert "ok   cuda:1 kernels: kernels is well" in lines


# --- what is measured, on the CPU -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("major", "minor", "expected"),
    [
        (9, 0, (True, "GPU, 80 GiB, capability 9.0")),
        (7, 5, (False, "GPU, 80 GiB, capability 7.5: bf16 needs 8.0")),
    ],
)
def test_the_device(
    machine: Machine, measuring: Any, major: int, minor: int, expected: tuple[bool, str]
) -> None:
    properties = SimpleNamespace(name="GPU", total_memory=80 * GiB, major=major, minor=minor)
    machine.patch(torch.cuda, "get_device_properties", lambda _: properties)
    assert measuring._device(0) == expected


def test_mapping(machine: Machine, measuring: Any) -> None:
    machine.patch(measuring, "CudaDriver", lambda _: HostDriver(Bytes(64 * MiB)))
    is_good, text = measuring._mapping(0)
    assert is_good
    assert text.startswith("a slab of 32 MiB maps in ")


def test_mapping_that_fails(machine: Machine, measuring: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The third call is `create`."""
    machine.patch(measuring, "CudaDriver", lambda _: FailingDriver(HostDriver(Bytes(64 * MiB)), fail_at=3))
    for name in ("device", "link", "kernels"):
        machine.patch(measuring, f"_{name}", fake_check(name))
    status, lines = machine.report(capsys)
    assert status == 1
    assert "FAIL cuda:0 mapping: create failed: injected; no worker starts on this GPU" in lines


@pytest.mark.parametrize(("rate", "is_good", "load"), [(54e9, True, "0.32"), (12e9, False, "1.43")])
def test_the_link(machine: Machine, measuring: Any, rate: float, is_good: bool, load: str) -> None:
    """A slow one is told with what it costs a load."""
    calls: list[str] = []
    rates = iter((12e9, rate))
    names = ("register_host", "unregister_host", "close")
    fake = SimpleNamespace(**{name: lambda *_, name=name: calls.append(name) for name in names})
    machine.patch(measuring, "CudaDriver", lambda _: fake)
    machine.patch(measuring, "_copy_rate", lambda *_: next(rates))
    on_cpu(machine, "empty")
    found, text = measuring._link(0)
    assert calls == list(names)
    assert found == is_good
    assert text.startswith(f"{rate / 1e9:.0f} GB/s from registered host memory, 12 from other; registering")
    assert text.endswith(f"; 16 GiB of weights load in {load} s")


def test_kernels(machine: Machine, measuring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes something else is no kernel."""

    def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate_up[:, :64]) * gate_up[:, 64:]

    rows: Any = ModuleType("prism.attention.gpu.rows")
    rows.silu_mul = silu_mul
    monkeypatch.setitem(sys.modules, "prism.attention.gpu.rows", rows)
    on_cpu(machine, "ones")
    is_good, text = measuring._kernels(0)
    assert is_good
    assert text.startswith("Triton compiles and runs, ")
    rows.silu_mul = lambda gate_up: 2 * silu_mul(gate_up)
    with pytest.raises(ArithmeticError, match="computes something else than torch"):
        measuring._kernels(0)


def on_cpu(machine: Machine, name: str) -> None:
    """Lets torch's function make its tensor on the CPU, whatever device is named."""
    real = getattr(torch, name)
    machine.patch(torch, name, lambda *shape, device=None, **rest: real(*shape, **rest))
