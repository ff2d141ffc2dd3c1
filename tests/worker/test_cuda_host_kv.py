"""KV goes to host memory and back on a GPU: bit by bit, in order, and beside the lane's steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prism.config import DeviceConfig
from prism.memory.slabs import KvOwner
from prism.memory.tensors import tensor_at
from prism.messages import Evict
from prism.types import Address, Bytes, GiB, LaneId, MiB, ModelId
from prism.worker.copies import Run
from prism.worker.device import Device
from prism.worker.host_chunks import HostChunks
from prism.worker.needs import LEAST
from tests.support.checkpoints import make_model, prompts, save

pytestmark = pytest.mark.gpu

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
LANE, OTHER = LaneId(0), LaneId(1)


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    from prism.worker.cuda_device import open_cuda

    device = open_cuda(DeviceConfig(kind="cuda", memory=4 * GiB, slab=32 * MiB), LEAST)
    yield device
    torch.cuda.synchronize()
    device.close()


@pytest.fixture(scope="module")
def host(device: Device) -> Iterator[HostChunks]:
    """1 GiB, registered."""
    chunks = HostChunks(Bytes(32 * MiB), 32, device.backend.pinner)
    chunks.ask(32)
    while chunks.make():
        pass
    assert chunks.error is None
    yield chunks
    torch.cuda.synchronize()
    chunks.close()


@pytest.fixture
def slabs(device: Device) -> Iterator[torch.Tensor]:
    """1 GiB of the window, full of random bytes."""
    owner = KvOwner(ModelId("m"))
    taken = device.pool.take(owner, 32)
    assert taken == tuple(range(taken[0], taken[0] + 32))
    memory = tensor_at(device.pool.address(taken[0]), (GiB,), torch.uint8, None, device.device)
    memory.random_()
    torch.cuda.synchronize()
    yield memory
    torch.cuda.synchronize()
    device.pool.give_back(owner, taken)


def runs(source: int, target: int, size: int, count: int) -> list[Run]:
    """`count` copies side by side, which stay as they are: nobody merges them here."""
    step = size // count
    return [Run(Address(source + i * step), Address(target + i * step), Bytes(step)) for i in range(count)]


def test_bytes_come_back_as_they_went(device: Device, host: HostChunks, slabs: torch.Tensor) -> None:
    before = slabs.clone()
    begin = time.perf_counter()
    out = device.backend.copy_out(runs(slabs.data_ptr(), host.base, GiB, 256), LANE, aside=False)
    queued = time.perf_counter() - begin
    torch.cuda.synchronize()
    slabs.zero_()
    torch.cuda.synchronize()
    back = device.backend.copy_in(runs(host.base, slabs.data_ptr(), GiB, 256), LANE)
    torch.cuda.synchronize()
    assert torch.equal(slabs, before)
    speeds = [GiB / work.seconds() / 1e9 for work in (out, back)]
    print(
        f"\nout {speeds[0]:.1f} GB/s, back {speeds[1]:.1f} GB/s; 256 copies queued in {1e3 * queued:.2f} ms"
    )
    assert min(speeds) > 15 and queued < 0.02


def test_copies_aside_run_behind_the_lanes_steps(
    device: Device, host: HostChunks, slabs: torch.Tensor
) -> None:
    """What is queued on the lane writes late; the copy has it all the same."""
    slabs.fill_(1)
    torch.cuda.synchronize()
    lane = device.backend._lanes[LANE]  # type: ignore[attr-defined]
    with torch.cuda.stream(lane.stream):
        torch.cuda._sleep(50_000_000)
        slabs.fill_(7)
    work = device.backend.copy_out(runs(slabs.data_ptr(), host.base, 64 * MiB, 8), LANE, aside=True)
    while not work.is_done():
        pass
    there = tensor_at(host.base, (64 * MiB,), torch.uint8)
    assert bool((there == 7).all())


def test_a_lane_is_not_held_up_by_copies_aside(device: Device, host: HostChunks, slabs: torch.Tensor) -> None:
    """A GiB that kept the engine busy delayed tokens, which leave through it too, by 19 ms."""
    lane = device.backend._lanes[LANE]  # type: ignore[attr-defined]
    small = torch.rand(1024, device=device.device).mul_(1.5)  # loads the kernel
    token = torch.empty(1024, pin_memory=True)
    torch.cuda.synchronize()
    copies = device.backend.copy_out(runs(slabs.data_ptr(), host.base, GiB, 64), LANE, aside=True)
    start = begin = time.perf_counter()
    waited = []
    while not copies.is_done():
        with torch.cuda.stream(lane.stream):
            small.mul_(1.5)
            token.copy_(small, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        while not event.query():  # type: ignore[no-untyped-call]
            copies.is_done()  # as the loop looks, which queues the next piece
        waited.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    speed = GiB / (time.perf_counter() - start) / 1e9
    print(
        f"\n{len(waited)} small steps meanwhile, the slowest in {1e3 * max(waited):.2f} ms; {speed:.1f} GB/s"
    )
    assert len(waited) > 20 and max(waited) < 0.004 and speed > 15


def test_a_lane_can_be_made_to_wait_for_them(device: Device, host: HostChunks, slabs: torch.Tensor) -> None:
    before = slabs[: 64 * MiB].clone()
    torch.cuda.synchronize()
    copies = device.backend.copy_out(runs(slabs.data_ptr(), host.base, GiB, 64), LANE, aside=True)
    device.backend.wait_for(OTHER, [copies])
    with torch.cuda.stream(device.backend._lanes[OTHER].stream):  # type: ignore[attr-defined]
        slabs.zero_()
    torch.cuda.synchronize()
    there = tensor_at(host.base, (64 * MiB,), torch.uint8)
    assert torch.equal(there, before.cpu())
    assert copies.is_done() and copies.seconds() > 0


# --- a whole worker --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for seed, name in enumerate(("a", "b", "c")):
        model = make_model("llama", seed=seed, max_position_embeddings=4096, head_dim=64, **SHAPE)
        made[name] = save(model.bfloat16(), folder / name)
    return made


def slow_worker(paths: dict[str, Path], spare_slabs: int) -> Any:
    """Takes its GPU for so slow that it is worth moving the KV of models as small as these."""
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=2, spare_slabs=spare_slabs)
    local.worker.costs._rates = replace(local.device.rates, flops=1e11)
    return local


def table(local: Any, name: str, count: int) -> torch.Tensor:
    from tests.support.gpu_worker import rest

    engine = local.worker.models[name].engine
    (sequence,) = engine.scheduler.running
    index = torch.tensor(sequence.blocks[:count], device="cuda")
    rest(local)
    found: torch.Tensor = engine.runner.kv.pages[index].clone()
    rest(local)
    return found


def test_a_model_that_returns_finds_its_kv_bit_by_bit(paths: dict[str, Path]) -> None:
    from tests.support.gpu_worker import rest

    local = slow_worker(paths, spare_slabs=100)
    prompt = prompts(1, 2, seed=1)[0] * 1000 + prompts(1, 1000, seed=2)[0]
    contents, texts = [], []
    for name in ("first", "second"):
        local.submit(name, "a", prompt, max_tokens=40)
        local.run(rounds=10**6, until=lambda name=name: len(local.outbox.tokens.get((name, 0), [])) > 4)
        count = (len(prompt) - 1) // local.worker.models["a"].profile.kv.tokens_per_block
        contents.append(table(local, "a", count))
        local.run(rounds=10**6)
        texts.append(local.outbox.tokens[name, 0])
        if name == "first":
            local.worker.on_command(Evict(epoch=1, command_id=1, model="a"))
            local.run(rounds=10**6)
            while local.worker.is_device_busy:
                local.worker.advance()
            local.poison()
            rest(local)
    size = local.worker.models["a"].profile.kv.tokens_per_block
    assert local.outbox.started["second"].cached_tokens == (len(prompt) - 1) // size * size > 900
    assert torch.equal(contents[0].view(torch.int16), contents[1].view(torch.int16))
    assert texts[0] == texts[1]
    local.close()


def test_conversations_under_pressure(paths: dict[str, Path]) -> None:
    """Three models on memory for two: turn after turn, each goes on from what it had.

    Where blocks come late one or two are computed instead, in other chunks: bf16 may end in another text.
    """
    local = slow_worker(paths, spare_slabs=22)
    roomy = slow_worker(paths, spare_slabs=200)
    history = {name: prompts(1, 600, seed=i)[0] for i, name in enumerate(paths)}
    same_texts = same_cached = 0
    for turn in range(4):
        for name in paths:
            request = f"{name}{turn}"
            for worker in (local, roomy):
                worker.submit(request, name, history[name], max_tokens=30)
                worker.run(rounds=10**6)
            texts = [worker.outbox.tokens[request, 0] for worker in (local, roomy)]
            cached = [worker.outbox.started[request].cached_tokens for worker in (local, roomy)]
            same_texts += texts[0] == texts[1]
            same_cached += cached[0] == cached[1]
            history[name] = history[name] + texts[1] + [turn]
            local.poison()
    evictions = sum(model.num_evictions for model in local.worker.models.values())
    fetched = sum(local.worker.host.counts(ModelId(name))[1] for name in paths)
    print(
        f"\n{evictions} evictions, {fetched} blocks fetched; same: {same_texts} texts, {same_cached} cached"
    )
    assert evictions >= 3 and fetched > 0
    assert same_texts >= 10 and same_cached >= 9
    local.close()
    roomy.close()
