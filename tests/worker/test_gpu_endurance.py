"""Long runs on a GPU: lanes overlap for thousands of steps, memory changes hands for hundreds of rounds."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prism.engine.engine import Engine, EngineRequest
from prism.engine.kv_blocks import KvSpace
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.memory.tensors import tensor_at
from prism.models.decoder import Decoder
from prism.types import Bytes, MiB, ModelId, RequestId, SamplingParams
from tests.support.cached_blocks import CachedBlocks
from tests.support.checkpoints import VOCAB, make_model, prompts, save

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
FAMILIES = ("llama", "qwen3")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for seed, family in enumerate(FAMILIES):
        extra = {"head_dim": 64} if family == "llama" else {}
        model = make_model(family, seed=seed, max_position_embeddings=8192, **SHAPE, **extra)
        made[family] = save(model.bfloat16(), folder / family)
    return made


def open_engine(local: Any, name: str) -> Engine:
    """A model's engine on the device of a worker that does not use it, with weights put there by hand."""
    from prism.weights.client import pack_here
    from prism.weights.protocol import WeightSource
    from prism.worker.models import read_profile

    device = local.device
    profile = read_profile(local.config.model(name), device.slab_bytes)
    arena = device.new_arena(profile.arena_bytes)
    slabs = device.pool.take(WeightsOwner(ModelId(name)), profile.weight_slabs)
    arena.map([device.pool.handle(slab) for slab in slabs])
    with pack_here(WeightSource(model=ModelId(name), path=str(local.paths[name]))) as packed:
        target = tensor_at(arena.base, (packed.total_bytes,), torch.uint8, None, device.device)
        target.copy_(torch.from_numpy(packed.data.copy()))
    from prism.models.rotary import rotary_table

    rotary = device.rotary_tensor(profile, arena)
    spec = profile.spec
    rotary.copy_(rotary_table(spec.rope, spec.head_dim, spec.max_position))
    kv = KvSpace(profile.kv)
    for slab in device.pool.take(KvOwner(ModelId(name)), 60):
        kv.add_slab(slab)
    device.backend.prepare(spec)
    torch.cuda.synchronize()
    lane = device.bind()
    runner = device.backend.runner(
        Decoder(spec, device.weight_tensors(profile, arena), rotary),
        device.kv_view(spec, profile.kv),
        lane.lane_id,
    )
    return Engine(kv, runner, lane.slots, max_len=spec.max_position, max_batch_size=64)


def drive(local: Any, engines: list[Engine], steps: int, first: int) -> list[dict[RequestId, list[int]]]:
    """Eight sequences each, two steps queued at all times, graphs captured beside them; the tokens."""
    texts: list[dict[RequestId, list[int]]] = [{} for _ in engines]
    flights: list[deque[Any]] = [deque() for _ in engines]
    for seed, engine in enumerate(engines):
        for i in range(8):
            params = SamplingParams(max_tokens=steps, temperature=0.9, top_k=20 if i % 2 else 0, seed=i)
            prompt = torch.randint(0, VOCAB, (64 + i,), generator=torch.Generator().manual_seed(first + seed))
            engine.add(EngineRequest(RequestId(str(i)), prompt.tolist(), params, arrival=float(i)))
    while any(not engine.is_idle or flight for engine, flight in zip(engines, flights, strict=True)):
        for engine, queue, text in zip(engines, flights, texts, strict=True):
            if queue and queue[0].is_done():
                drawn = engine.commit(queue.popleft())
                for sequence, token in zip(drawn.sequences, drawn.tokens, strict=True):
                    text.setdefault(sequence.request_id, []).append(token)
            if len(queue) < 2 and engine.scheduler.has_work:
                step = engine.schedule(4096)
                if step is not None:
                    queue.append(engine.run(step))
                    queue[-1].launch()
        local.device.backend.work_aside(0.001, urgent_only=False)
    return texts


def test_ten_thousand_overlapped_steps(paths: dict[str, Path]) -> None:
    """Two models on two lanes, contexts of up to 5,000 tokens: the tokens are those of one lane."""
    from tests.support.gpu_worker import gpu_worker, rest

    texts = []
    for lanes in (1, 2):
        local = gpu_worker(paths, lanes=lanes, spare_slabs=200)
        engines = [open_engine(local, name) for name in FAMILIES]
        drive(local, engines, 5000, first=100)  # has all graphs captured: others round in another order
        rest(local)
        texts.append(drive(local, engines, 5000, first=0))
        rest(local)
    assert all(len(text) == 5000 for one in texts[1] for text in one.values())
    assert texts[0] == texts[1]


class Canaries:
    """Free slabs hold a pattern that nobody may overwrite."""

    PATTERN = 0x5AFE5AFE

    def __init__(self, local: Any) -> None:
        self._local = local
        self._known: set[int] = set()
        self._stream = torch.cuda.Stream()
        self.num_checked = 0

    def look(self) -> None:
        """Check those that are still free, and mark those that have become free."""
        pool = self._local.device.pool
        free = set(pool.free_slabs())
        with torch.cuda.stream(self._stream):
            for slab in self._known & free:
                assert bool((self._words(slab) == self.PATTERN).all()), f"slab {slab} was written while free"
                self.num_checked += 1
            for slab in free - self._known:
                self._words(slab).fill_(self.PATTERN)
            self._stream.synchronize()
        self._known = free

    def _words(self, slab: int) -> torch.Tensor:
        pool = self._local.device.pool
        return tensor_at(pool.address(slab), (2 * MiB // 4,), torch.int32, None, self._local.device.device)


def test_nobody_writes_to_what_was_given_up(paths: dict[str, Path]) -> None:
    """Slabs change hands under queued steps; whose they were writes neither to free ones nor to others."""
    from tests.support.gpu_worker import gpu_worker

    local = gpu_worker(paths, lanes=2, spare_slabs=26)
    canaries, blocks, rng = Canaries(local), CachedBlocks(local, every=10), random.Random(1)
    stream = torch.cuda.Stream()
    number = 0
    for _ in range(1200):
        if len(local.worker.requests) < 6 and rng.random() < 0.4:
            prompt = prompts(1, 1500, seed=number)[0]
            local.submit(str(number), FAMILIES[rng.random() < 0.5], prompt, max_tokens=rng.randint(1, 60))
            number += 1
        local.pump()
        canaries.look()
        for lane in local.device.backend._lanes:  # type: ignore[attr-defined]
            stream.wait_stream(lane.stream)  # a block may be moved or fetched there
        with torch.cuda.stream(stream):
            blocks.look()
    local.run(rounds=10**6)
    assert number > 30 and canaries.num_checked > 500 and blocks.num_checked > 500
    assert set(local.outbox.tokens) == {(str(i), 0) for i in range(number)}
    local.close()


LENGTHS = (40, 333, 900)
"""Of prompts. With others all the time new numbers of rows come up for hundreds of rounds, for which cuBLAS
loads kernels that it has not used yet: 2 MiB of the device every seven rounds or so."""


def random_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def test_five_hundred_rounds_leave_nothing_behind(paths: dict[str, Path]) -> None:
    """Activations, evictions and bursts at random: our account of the device's memory agrees with its own.

    That counts all processes, so nobody else may use the device meanwhile.
    """
    from prism.worker.cuda_device import TORCH_RESERVE
    from tests.support.gpu_worker import clear_memory, gpu_worker, rest

    clear_memory()
    held_before = torch.cuda.memory_reserved()
    local = gpu_worker(paths, lanes=2, spare_slabs=26)
    rng = random.Random(2)
    used: list[int] = []
    """Without graphs, which are counted."""
    unaccounted: list[int] = []
    for turn in range(500):
        for i in range(rng.randint(1, 4)):
            prompt = random_prompt(rng.choice(LENGTHS), seed=turn * 10 + i)
            kind = {"temperature": 0.8, "top_p": 0.9} if rng.random() < 0.3 else {}
            local.submit(f"{turn}.{i}", FAMILIES[rng.random() < 0.5], prompt, max_tokens=8, **kind)
        local.run(rounds=10**6)
        if rng.random() < 0.5:
            model = local.worker.models[FAMILIES[rng.random() < 0.5]]
            if model.is_active:
                local.worker.evict(model)
        rest(local)
        info = local.device.driver.memory_info()
        used.append(info.total - info.free - local.device.backend.graph_usage.num_bytes)
        unaccounted.append(local.device.ledger().unaccounted(info))
    evictions = sum(model.num_evictions for model in local.worker.models.values())
    assert evictions > 150
    print([(u - used[0]) // MiB for u in used[::20]])
    assert max(used[300:]) - max(used[100:200]) <= 4 * MiB
    assert max(used[300:]) - used[50] <= 64 * MiB
    settled = max(unaccounted[100:200])  # the context, and kernels, which come as they are used
    ledger = local.device.ledger()
    ledger = replace(ledger, reserves={**ledger.reserves, "context and kernels": Bytes(settled)})
    ledger.check(local.device.driver.memory_info(), Bytes(16 * MiB))  # what is counted twice, too
    assert torch.cuda.memory_reserved() - held_before <= TORCH_RESERVE // 4
    local.close()
