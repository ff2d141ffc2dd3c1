"""Engines on this machine's GPU without server or worker: random weights straight on the device."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from llama import SHAPES

from prism.config import DeviceConfig, ModelConfig
from prism.engine.engine import Drawn, Engine, EngineRequest
from prism.engine.kv_blocks import KvSpace
from prism.engine.step import Step
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.models.decoder import Decoder
from prism.models.rotary import rotary_table
from prism.types import Bytes, GiB, MiB, ModelId, Quantization, RequestId, SamplingParams
from prism.worker.cuda_device import open_cuda
from prism.worker.device import Device
from prism.worker.lanes import Lane
from prism.worker.loop import ASIDE_SECONDS
from prism.worker.models import read_profile
from prism.worker.needs import ModelNeeds


def prompt(seed: int, length: int) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 128000, (length,), generator=generator).tolist()


def pool_memory(most: int) -> Bytes:
    """So many GiB, or all that is free on the GPU but for 10."""
    return Bytes(min(most, torch.cuda.mem_get_info()[0] // GiB - 10) * GiB)


def open_device(memory: Bytes, *, lanes: int = 1, batch: int = 512, tokens: int = 8192) -> Device:
    """A GPU with a pool of `memory`, for steps of so many sequences and tokens."""
    config = DeviceConfig(
        kind="cuda", memory=memory, lanes=lanes, max_batch_size=batch, max_batch_tokens=tokens, slab=32 * MiB
    )
    return open_cuda(config, ModelNeeds(8192, 128256))


def fill(tensors: dict[str, torch.Tensor]) -> None:
    """The same random numbers for every model of a shape; quantised matrices get those of bf16, quantised."""
    generator = torch.Generator("cuda").manual_seed(0)
    for key, tensor in tensors.items():
        if key.endswith("_scale"):
            continue
        scale = tensors.get(f"{key}_scale")
        target = tensor if scale is None else torch.empty(tensor.shape, dtype=torch.bfloat16, device="cuda")
        spread = 0.0 if key.endswith("norm") else 0.02
        target.normal_(1.0 if key.endswith("norm") else 0.0, spread, generator=generator)
        if scale is not None:
            scale.copy_(target.abs().amax(1).float() / 448)
            tensor.copy_(target.float() / scale[:, None])


class LocalModel:
    """One engine with random weights and so many GiB of KV."""

    def __init__(
        self,
        device: Device,
        shape: str,
        name: str,
        folder: Path,
        kv_gib: float,
        batch: int = 512,
        quantization: Quantization = "none",
        *,
        is_new: bool = False,
    ) -> None:
        """One that `is_new` has no graphs, and only the kernels that a load prepares."""
        path = folder / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(SHAPES[shape]))
        config = ModelConfig(name=name, path=str(path), quantization=quantization)
        profile = read_profile(config, device.slab_bytes)
        self.profile, self.device, self.name = profile, device, ModelId(name)
        arena = self.arena = device.new_arena(profile.arena_bytes)
        slabs = device.pool.take(WeightsOwner(ModelId(name)), profile.weight_slabs)
        arena.map([device.pool.handle(slab) for slab in slabs])
        self.tensors = device.weight_tensors(profile, arena)
        fill(self.tensors)
        rotary = device.rotary_tensor(profile, arena)
        rotary.copy_(rotary_table(profile.spec.rope, profile.spec.head_dim, profile.spec.max_position))
        torch.cuda.synchronize()
        kv = KvSpace(profile.kv)
        for slab in device.pool.take(KvOwner(ModelId(name)), int(kv_gib * GiB) // device.slab_bytes):
            kv.add_slab(slab)
        self.lane: Lane = device.bind()
        decoder = Decoder(profile.spec, self.tensors, rotary)
        runner = self.runner = device.backend.runner(
            decoder, device.kv_view(profile.spec, profile.kv), self.lane.lane_id
        )
        self.engine = Engine(kv, runner, self.lane.slots, max_len=8192, max_batch_size=batch)
        device.backend.prepare(profile.spec)
        if not is_new:
            device.backend.expect(runner)
            self.settle()

    def settle(self) -> None:
        """Capture what steps lacked so far: while it is under way, what is measured shares the host with
        it.
        """
        while self.device.backend.work_aside(ASIDE_SECONDS, urgent_only=False):
            pass

    def close(self) -> None:
        """Give all memory back. Its graphs stay with the lane, so no model may follow that captures some."""
        torch.cuda.synchronize()
        self.arena.close()
        for owner in (WeightsOwner(self.name), KvOwner(self.name)):
            self.device.pool.give_back(owner, self.device.pool.owned(owner))

    def read_bytes(self) -> int:
        """Weights that a decode step reads: all but the input embedding, unless it is the head as well."""
        spec = self.profile.spec
        total = sum(entry.size for entry in self.profile.weights.entries)
        return total if spec.tied_embeddings else total - spec.vocab_size * spec.hidden_size * 2

    def add(self, name: str, prompt: list[int], max_tokens: int, **params: Any) -> None:
        """A request."""
        settings = {"max_tokens": max_tokens, "temperature": 0.0, "seed": 0} | params
        self.engine.add(EngineRequest(RequestId(name), prompt, SamplingParams(**settings)))


@dataclass
class Driven:
    """What it took to run everything, in seconds."""

    wall_s: float = 0.0
    host_s: float = 0.0
    """To schedule, launch and commit steps."""
    steps: int = 0
    decodes: list[tuple[int, float]] = field(default_factory=list)
    """Steps without prompts: their rows, and the host's time for each."""


def next_step(engine: Engine, budget: int) -> Step | None:
    """With room for it, which caches make."""
    missing = sum(want.num_blocks for want in engine.scheduler.wants(budget)) - engine.kv.num_free
    engine.kv.drop_cached(max(0, missing))
    return engine.schedule(budget)


def drive(
    models: list[LocalModel],
    budget: int = 8192,
    on_drawn: Callable[[LocalModel, Drawn, float], None] | None = None,
    depth: int = 2,
    around: Callable[[Callable[[], Any]], Any] = lambda launch: launch(),
) -> Driven:
    """Run everything to its end with at most `depth` steps queued for each model.

    `around` is given what launches a step.
    """
    flights: dict[int, deque[tuple[Any, float]]] = {id(m): deque() for m in models}
    driven = Driven()
    begin = time.perf_counter()
    while True:
        busy = False
        for model in models:
            queue = flights[id(model)]
            while queue and queue[0][0].is_done():
                start = time.perf_counter()
                flight, made = queue.popleft()
                drawn = model.engine.commit(flight)
                now = time.perf_counter()
                driven.host_s += now - start
                if not flight.step.has_prompts:
                    driven.decodes.append((len(flight.step.decodes), made + now - start))
                if on_drawn is not None:
                    on_drawn(model, drawn, now)
            if len(queue) < depth and model.engine.scheduler.has_work:
                start = time.perf_counter()
                step = next_step(model.engine, budget)
                if step is not None:
                    flight = model.engine.run(step)
                    around(flight.launch)
                    driven.steps += 1
                spent = time.perf_counter() - start
                driven.host_s += spent
                if step is not None:
                    queue.append((flight, spent))
            model.device.backend.work_aside(ASIDE_SECONDS, urgent_only=True)  # as the worker's loop does
            busy = busy or bool(queue) or not model.engine.is_idle
        if not busy:
            driven.wall_s = time.perf_counter() - begin
            return driven
