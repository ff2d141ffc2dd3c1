"""Run by hand on a machine with an NVIDIA GPU: `pytest -m gpu -s tests/worker/test_cuda_activation.py`.

Loads at full size through what production uses: link, registrations, arena. Prints what it measures.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch

from prism.config import DeviceConfig
from prism.memory import memfd
from prism.memory.arena import Arena
from prism.memory.slabs import WeightsOwner
from prism.memory.tensors import tensor_at
from prism.types import Bytes, GiB, MiB, ModelId, SlabId
from prism.weights.client import PackedWeights
from prism.weights.layout import Layout
from prism.weights.link import ThreadLink
from prism.weights.packer import pack, plan_source
from prism.weights.places import Places
from prism.weights.protocol import Manifest, WeightSource
from prism.weights.registrations import REGISTER_BYTES, Registrations, RegistrationThread
from prism.worker.device import Device
from prism.worker.loading import Load, Loaded, LoadPlan, unload
from prism.worker.needs import LEAST
from prism.worker.rates import measure_rates
from tests.weights.support import dummy_source

pytestmark = pytest.mark.gpu

LARGE = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""3 GB of weights."""
A, B = ModelId("a"), ModelId("b")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[ModelId, WeightSource]:
    folder = tmp_path_factory.mktemp("models")
    return {name: dummy_source(folder, name, **LARGE) for name in (A, B)}


@pytest.fixture(scope="module")
def files(sources: dict[ModelId, WeightSource]) -> Iterator[dict[ModelId, int]]:
    """Packed once, each in a memory file."""
    made = {name: memfd.create_memfd("prism-test") for name in sources}
    for name, fd in made.items():
        pack(sources[name], fd, lambda _: None)
    yield made
    for fd in made.values():
        os.close(fd)


def mapped(source: WeightSource, fd: int, *, writable: bool) -> PackedWeights:
    layout = plan_source(source)
    manifest = Manifest(model=source.model, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint)
    return PackedWeights(manifest, fd, None, writable=writable)


@pytest.fixture(scope="module")
def packed(
    sources: dict[ModelId, WeightSource], files: dict[ModelId, int]
) -> Iterator[dict[ModelId, PackedWeights]]:
    """What loads read that find nothing registered."""
    made = {name: mapped(sources[name], fd, writable=False) for name, fd in files.items()}
    yield made
    gc.collect()
    for each in made.values():
        each.close()


NewRegistrations = Callable[..., Registrations]


@pytest.fixture
def registered(
    device: Device, sources: dict[ModelId, WeightSource], files: dict[ModelId, int]
) -> Iterator[NewRegistrations]:
    """Makes registrations of some models, mapped as production maps them; nothing is registered yet."""
    made: list[Registrations] = []

    def borrow(model: ModelId, *, writable: bool) -> PackedWeights:
        return mapped(sources[model], files[model], writable=writable)

    def new(*names: ModelId) -> Registrations:
        assert device.backend.pinner is not None
        made.append(Registrations(device.backend.pinner, borrow, Bytes(64 * GiB), names))
        for name in names:
            made[-1].announce(name, plan_source(sources[name]).total_bytes)
        return made[-1]

    yield new
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    from prism.worker.cuda_device import open_cuda

    device = open_cuda(DeviceConfig(kind="cuda", memory=10 * GiB), LEAST)
    yield device
    torch.cuda.synchronize()
    gc.collect()
    device.close()


@pytest.fixture
def link(device: Device) -> Iterator[ThreadLink]:
    link = ThreadLink(device.backend.copier)
    yield link
    link.close()


class Lent:
    """Packed weights that stay when a load gives them back."""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed

    def __getattr__(self, name: str) -> object:
        return getattr(self._packed, name)

    def __enter__(self) -> PackedWeights:
        return self._packed

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


class Resident:
    """A model's slabs and arena, as the loop holds them."""

    def __init__(self, device: Device, layout: Layout, name: ModelId) -> None:
        self.device, self.layout, self.name = device, layout, name
        self.arena = Arena(device.driver, layout.total_bytes, device.slab_bytes)
        self.slabs: tuple[SlabId, ...] = ()

    def load(
        self,
        packed: PackedWeights,
        link: ThreadLink,
        registrations: Registrations | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> Load:
        pool = self.device.pool
        self.slabs = pool.take(WeightsOwner(self.name), self.arena.num_slabs)
        pool.add_alias(self.slabs)
        plan = LoadPlan(
            model=self.name,
            layout=self.layout,
            arena=self.arena,
            handles=tuple(pool.handle(slab) for slab in self.slabs),
            places=Places(tuple(pool.address(slab) for slab in self.slabs), pool.slab_bytes),
            prepare=prepare,
            fill=lambda: None,
        )
        return Load(plan, lambda _: Lent(packed), registrations, link, time.perf_counter)  # type: ignore[arg-type,return-value]

    def give_slabs_back(self) -> None:
        torch.cuda.synchronize()
        self.device.pool.give_back(WeightsOwner(self.name), self.slabs)

    def unmap(self) -> None:
        assert unload(self.name, self.arena, 0.0).error is None
        self.device.pool.remove_alias(self.slabs)

    def is_right(self, packed: PackedWeights) -> bool:
        there = tensor_at(self.arena.base, (self.layout.total_bytes,), torch.uint8, None, self.device.device)
        return bool((there.cpu().numpy() == packed.data).all())


@pytest.fixture
def residents(device: Device, sources: dict[ModelId, WeightSource]) -> Iterator[dict[ModelId, Resident]]:
    made = {name: Resident(device, plan_source(source), name) for name, source in sources.items()}
    yield made
    torch.cuda.synchronize()
    for each in made.values():
        each.arena.close()


def run(load: Load) -> Loaded:
    event = load.run()
    assert event.error is None, event.error
    return event


@pytest.fixture
def threads() -> Iterator[int]:
    """A worker's: torch copies on all cores. Tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def test_the_link_is_used_in_full(
    device: Device,
    threads: int,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    """Registered: nearly what plain copies of pinned memory reach. Through the ring: what the host copies."""
    resident, weights = residents[A], packed[A]
    registrations = registered(A)
    speeds = {}
    for what in ("ring", "ring again", "registered", "registered again"):
        if what == "registered":
            begin = time.perf_counter()
            while registrations.step():
                pass
            seconds = time.perf_counter() - begin
            assert registrations.error is None and registrations.total_bytes == weights.total_bytes
            print(
                f"\nregistering: {seconds / (weights.total_bytes / GiB):.3f} s/GiB, "
                f"mapped for writing: {registrations._maps_writable}"
            )
        event = run(resident.load(weights, link, registrations))
        speeds[what] = weights.total_bytes / event.seconds / 1e9
        assert resident.is_right(weights)
        resident.give_slabs_back()
        resident.unmap()
    speeds["pinned"] = measure_rates(device.device).link / 1e9
    speeds["host"] = speed_of_host(weights)
    print({what: f"{speed:.1f} GB/s" for what, speed in speeds.items()})
    assert speeds["registered again"] > 0.85 * speeds["pinned"]
    assert speeds["ring again"] > 0.35 * min(speeds["host"], speeds["pinned"])


def speed_of_host(weights: PackedWeights) -> float:
    """GB/s of plain copies from packed weights to pinned memory, of the second time."""
    pieces = torch.empty(4, 16 * MiB, dtype=torch.uint8, pin_memory=True)
    parts = tensor_at(weights.address, (weights.total_bytes,), torch.uint8).split(pieces.shape[1])
    for _ in range(2):
        begin = time.perf_counter()
        for part, piece in zip(parts, cycle(pieces), strict=False):
            piece[: len(part)].copy_(part)
        seconds = time.perf_counter() - begin
    return weights.total_bytes / seconds / 1e9


def test_a_busy_loop_does_not_keep_the_link_waiting(
    device: Device,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    """A dozen calls a piece gave up the interpreter, and got it back when the loop let them: 38 GB/s."""
    resident, weights = residents[A], packed[A]
    registrations = registered(A)
    while registrations.step():
        pass
    small = torch.zeros(1024, device="cuda")
    speeds = []
    for _ in range(3):
        load = resident.load(weights, link, registrations)
        events: list[Loaded] = []
        thread = threading.Thread(target=lambda load=load, events=events: events.append(run(load)))
        thread.start()
        while thread.is_alive():
            sum(range(5000))  # 0.1 ms of Python
            small.add_(1)
        speeds.append(weights.total_bytes / events[0].seconds / 1e9)
        torch.cuda.synchronize()
        assert resident.is_right(weights)
        resident.give_slabs_back()
        resident.unmap()
    print("\nbeside a busy loop", *(f"{speed:.1f}" for speed in speeds), "GB/s")
    assert max(speeds) > 0.85 * measure_rates(device.device).link / 1e9


def test_a_load_goes_on_while_the_victim_is_unmapped(
    device: Device,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    """Both arenas show the same slabs for a while."""
    registrations = registered(B)
    while registrations.step():
        pass
    run(residents[A].load(packed[A], link))
    for _ in range(3):
        victim, newcomer = residents[A], residents[B]
        victim.give_slabs_back()
        load = newcomer.load(packed[B], link, registrations)
        assert set(newcomer.slabs) & set(victim.slabs)
        unmapping = threading.Thread(target=victim.unmap)
        unmapping.start()
        run(load)
        unmapping.join()
        assert newcomer.is_right(packed[B])
        newcomer.give_slabs_back()
        newcomer.unmap()
        run(victim.load(packed[A], link))
        assert victim.is_right(packed[A])
    residents[A].give_slabs_back()
    residents[A].unmap()


def test_what_is_urgent_overtakes(
    device: Device,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    registrations = registered(A, B)
    while registrations.step():
        pass
    ends: dict[ModelId, float] = {}

    def load(name: ModelId, job: Load) -> None:
        run(job)
        ends[name] = time.perf_counter()

    jobs = {name: residents[name].load(packed[name], link, registrations) for name in (A, B)}
    jobs[B].deadline = 1.0
    begin = time.perf_counter()
    threads = [threading.Thread(target=load, args=(name, job)) for name, job in jobs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"\nurgent after {ends[B] - begin:.3f} s, the other after {ends[A] - begin:.3f} s")
    assert ends[B] < ends[A]
    assert ends[B] - begin < 0.7 * (ends[A] - begin)
    for name in (A, B):
        assert residents[name].is_right(packed[name])
        residents[name].give_slabs_back()
        residents[name].unmap()


def latencies(seconds: float) -> np.ndarray:
    """How long small kernels take from launch to end, one after the other, in milliseconds."""
    small = torch.zeros(1024, device="cuda")
    taken, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        small.add_(1)
        torch.cuda.current_stream().synchronize()
        taken.append((time.perf_counter() - begin) * 1e3)
    return np.array(taken)


def describe(what: str, taken: np.ndarray) -> None:
    p50, p99 = np.percentile(taken, (50, 99))
    print(f"{what}: median {p50:.3f} ms, 99 % {p99:.3f}, worst {taken.max():.2f} ({len(taken)} steps)")


def test_registering_and_loading_hold_no_step_for_long(
    device: Device,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    """The loop launches small steps all the while. A chunk of registration takes 5 ms in the driver."""
    print()
    latencies(0.2)
    describe("alone", latencies(0.5))
    registrations = registered(A, B)
    thread = RegistrationThread(registrations)
    taken = latencies(0.2)
    while registrations.total_bytes < packed[A].total_bytes + packed[B].total_bytes:
        taken = np.concatenate([taken, latencies(0.05)])
    describe(f"while chunks of {REGISTER_BYTES // MiB} MiB are registered", taken)
    assert np.percentile(taken, 99) < 2 and taken.max() < 50
    job = residents[A].load(packed[A], link, registrations)
    loading = threading.Thread(target=run, args=(job,))
    loading.start()
    during = latencies(0.01)
    while loading.is_alive():
        during = np.concatenate([during, latencies(0.01)])
    describe("during a load", during)
    assert np.percentile(during, 99) < 2 and during.max() < 50
    residents[A].give_slabs_back()
    residents[A].unmap()
    thread.close()


def test_groups_can_be_read_as_soon_as_they_have_arrived(
    device: Device,
    link: ThreadLink,
    packed: dict[ModelId, PackedWeights],
    residents: dict[ModelId, Resident],
    registered: NewRegistrations,
) -> None:
    """Kernels queued on another stream behind the host's look at `groups_arrived` read the right bytes."""
    resident, weights = residents[A], packed[A]
    ends = resident.layout.group_ends
    expected = [int(weights.data[end - 4096 : end].astype(np.int64).sum()) for end in ends]
    job = resident.load(weights, link)
    loading = threading.Thread(target=run, args=(job,))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    found: list[torch.Tensor] = []
    there = tensor_at(resident.arena.base, (weights.total_bytes,), torch.uint8, None, device.device)
    loading.start()
    with torch.cuda.stream(stream):
        while len(found) < len(ends):
            for end in ends[len(found) : job.groups_arrived]:
                found.append(there[end - 4096 : end].sum(dtype=torch.int64))
        sums = [int(each) for each in found]
    loading.join()
    assert sums == expected
    resident.give_slabs_back()
    resident.unmap()


def test_a_worker_serves_from_registered_weights(tmp_path: Path) -> None:
    """The whole server on the GPU: packed ahead, registered, loaded, and said so by `prism ps`."""
    from tests.server.harness import DEMO, PLAIN, Server
    from tests.support.waiting import wait_until

    device = {"kind": "cuda", "memory": "2GiB", "slab": "32MiB"}
    with Server(DEMO, device=device) as server:

        def registered_bytes() -> int:
            import httpx

            state = httpx.get(f"{server.admin}/admin/models", timeout=5, **PLAIN).json()
            (report,) = state["devices"]
            assert report["registration_error"] is None
            return int(report["registered_bytes"])

        wait_until(lambda: registered_bytes() > 0, "weights are registered")
