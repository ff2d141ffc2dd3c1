"""What `prism doctor` measures on each NVIDIA GPU: what a server will have, and what lacks cost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from prism.cli.doctor import Finding
from prism.memory.cuda import CudaDriver
from prism.types import Address, Bytes, GiB, MiB

PROBE = 256 * MiB
SLAB = Bytes(32 * MiB)
UNUSABLE = "no worker starts on this GPU"
SLOW = "without registered memory weights load half as fast or slower, and no KV waits in host memory"


def examine_gpus() -> Iterator[Finding]:
    """What was found on each, and whether it is as good as it can be. What fails is fatal, but the link."""
    for index in range(torch.cuda.device_count()):
        for check in (_device, _mapping, _link, _kernels):
            name = f"cuda:{index} {check.__name__[1:]}"
            try:
                torch.cuda.set_device(index)
                is_good, text = check(index)
            except Exception as error:  # whatever it is, of Triton's compiler, say: the rest is told, too
                cost = SLOW if check is _link else UNUSABLE
                yield Finding(name, False, f"{error}; {cost}", is_fatal=check is not _link)
            else:
                yield Finding(name, is_good, text)


def _device(index: int) -> tuple[bool, str]:
    """Hopper has all that the kernels use; before it they start one after the other."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    version = ".".join(map(str, capability))
    text = f"{properties.name}, {properties.total_memory / GiB:.0f} GiB, capability {version}"
    if capability < (8, 0):
        return False, f"{text}: bf16 needs 8.0"
    if capability < (9, 0):
        return True, f"{text}; kernels do not overlap before 9.0: about 5 % on decodes of one sequence"
    return True, text


def _mapping(index: int) -> tuple[bool, str]:
    """A slab created, mapped twice and taken away again."""
    driver = CudaDriver(index)
    places = driver.reserve(SLAB), driver.reserve(SLAB)
    handle = driver.create(SLAB)
    begin = time.perf_counter()
    for place in places:
        driver.map(place, handle)
    mapped = time.perf_counter() - begin
    for place in places:
        driver.unmap(place, SLAB)
        driver.unreserve(place, SLAB)
    driver.release(handle)
    driver.close()
    return True, f"a slab of 32 MiB maps in {mapped / 2 * 1e6:.0f} us"


def _link(index: int) -> tuple[bool, str]:
    """Host to device from registered and from other memory, and what registering costs."""
    driver = CudaDriver(index)
    target = torch.empty(PROBE, dtype=torch.uint8, device=f"cuda:{index}")
    source = torch.ones(PROBE, dtype=torch.uint8)
    plain = _copy_rate(target, source)
    address = Address(source.data_ptr())
    begin = time.perf_counter()
    driver.register_host(address, Bytes(PROBE))
    registering = (time.perf_counter() - begin) * GiB / PROBE
    fast = _copy_rate(target, source)
    driver.unregister_host(address)
    driver.close()
    text = f"{fast / 1e9:.0f} GB/s from registered host memory, {plain / 1e9:.0f} from other; registering "
    text += f"takes {registering:.2f} s/GiB; 16 GiB of weights load in {16 * GiB / fast:.2f} s"
    return fast > 20e9, text


def _copy_rate(target: torch.Tensor, source: torch.Tensor) -> float:
    """Bytes a second, of the second copy."""
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
    return target.numel() / (time.perf_counter() - begin)


def _kernels(index: int) -> tuple[bool, str]:
    """Compiles one small kernel, or finds it in Triton's cache."""
    from prism.attention.gpu.rows import silu_mul

    begin = time.perf_counter()
    gate_up = torch.ones(2, 128, dtype=torch.bfloat16, device=f"cuda:{index}")
    out = silu_mul(gate_up)
    expected = torch.nn.functional.silu(gate_up[:, :64]) * gate_up[:, 64:]
    if not torch.allclose(out, expected, rtol=0.02):
        raise ArithmeticError("a kernel that Triton compiled computes something else than torch")
    text = f"Triton compiles and runs, {time.perf_counter() - begin:.1f} s for one kernel"
    return True, f"{text}; a model's first load takes about 20 of them, later ones none"
