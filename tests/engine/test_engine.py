"""Two engines in one process, over one pool of slabs that they pass to and fro."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prism.attention.kernels import KvView
from prism.attention.torch_kernels import TorchKernels
from prism.engine.engine import Engine, EngineRequest
from prism.engine.kv_blocks import KvSpace
from prism.engine.kv_layout import KvLayout, plan_kv_layout
from prism.engine.sampler import Sampled
from prism.engine.scheduler import Slots
from prism.engine.step import Step
from prism.engine.torch_runner import TorchRunner
from prism.memory.host import HostDriver
from prism.memory.pool import SlabPool
from prism.memory.slabs import KvOwner
from prism.memory.tensors import torch_dtype
from prism.models.decoder import Decoder
from prism.models.rotary import rotary_table
from prism.modelspec import read_spec
from prism.types import Bytes, MiB, ModelId, RequestId, SamplingParams, SlabId
from prism.weights.client import pack_here
from prism.weights.layout import plan_layout
from prism.weights.protocol import WeightSource
from prism.weights.views import view_weights
from prism.worker.cpu_device import cpu_device
from tests.support.checkpoints import make_model, prompts, reference, save

SLAB = Bytes(2 * MiB)


def test_two_engines_alternate_over_one_window(tmp_path: Path) -> None:
    """Each step of one engine runs between two of the other; their blocks lie in neighbouring slabs."""
    pool = SlabPool(driver := HostDriver(Bytes(4 * SLAB)), SLAB, 4)
    device = cpu_device(driver, pool, "cpu:0")
    engines, outputs, expected, packed = {}, {}, {}, []
    for seed, family in enumerate(("llama", "qwen3")):
        model = make_model(family, seed=seed)
        path = save(model, tmp_path / family)
        spec = read_spec(path)
        packed.append(pack_here(WeightSource(model=ModelId(family), path=str(path))))
        layout = plan_kv_layout(spec, SLAB)
        assert layout is not None and torch_dtype(spec.dtype) is torch.float32
        kv = KvSpace(layout)
        for slab in pool.take(KvOwner(ModelId(family)), 2):
            kv.add_slab(slab)
        tensors = view_weights(plan_layout(spec), packed[-1].address, torch.device("cpu"))
        decoder = Decoder(spec, tensors, rotary_table(spec.rope, spec.head_dim, spec.max_position))
        view: KvView = device.kv_view(spec, layout)
        runner = TorchRunner(decoder, TorchKernels(torch.device("cpu")), view)
        engines[family] = Engine(kv, runner, Slots(8), max_len=spec.max_position, max_batch_size=8)
        for i, prompt in enumerate(prompts(5, 80, seed=seed)):
            request = RequestId(f"{family}{i}")
            params = SamplingParams(max_tokens=32, temperature=0, seed=0)
            engines[family].add(EngineRequest(request, prompt, params, arrival=float(i)))
            expected[request] = reference(model, prompt, 32)
    while not all(engine.is_idle for engine in engines.values()):
        for engine in engines.values():
            step = engine.schedule(40)
            if step is not None:
                flight = engine.run(step)
                flight.launch()
                drawn = engine.commit(flight)
                for sequence, token in zip(drawn.sequences, drawn.tokens, strict=True):
                    outputs.setdefault(sequence.request_id, []).append(token)
            engine.kv.check()
    assert outputs == expected


def test_drawn_tokens_are_counted_where_draws_depend_on_them() -> None:
    layout = KvLayout(tokens_per_block=4, block_bytes=Bytes(64), unit=Bytes(64), slab_bytes=Bytes(1024))
    engine = Engine(KvSpace(layout), FixedRunner(), Slots(8), max_len=100, max_batch_size=8)  # type: ignore[arg-type]
    engine.kv.add_slab(SlabId(0))
    for name, penalty in (("plain", 0.0), ("penalised", 0.5)):
        params = SamplingParams(max_tokens=5, presence_penalty=penalty, seed=0)
        engine.add(EngineRequest(RequestId(name), [1, 2], params))
    for _ in range(2):
        step = engine.schedule(100)
        assert step is not None
        engine.commit(engine.run(step))
    counts = {s.request_id: (s.tokens, s.counts) for s in engine.scheduler.running}
    assert counts == {"plain": ([1, 2, 7, 7], {}), "penalised": ([1, 2, 7, 7], {7: 2})}


class FixedRunner:
    """Draws sevens."""

    def run(self, step: Step, *, is_apart: bool = False) -> Any:
        draws = Sampled([7] * len(step.sampled), {})
        return SimpleNamespace(step=step, sampled=step.sampled, draws=lambda: draws)
