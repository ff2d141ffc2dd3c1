"""Logits of a random Llama-3.2-1B shape in bf16 on the GPU against fp32, beside transformers' own bf16."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from prism.attention.gpu.decode import choose_split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import Chunk, tiles_of
from prism.config import DeviceConfig, ModelConfig
from prism.engine.gpu.runner import GpuRunner
from prism.engine.kv_blocks import KvSpace
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.models.decoder import Decoder, at_once
from prism.models.rotary import rotary_table
from prism.types import BlockId, GiB, LaneId, ModelId
from prism.weights.client import pack_here
from prism.weights.link import ThreadLink
from prism.weights.places import Places
from prism.weights.protocol import WeightSource
from prism.weights.transfers import Transfer
from prism.worker.models import read_profile
from prism.worker.open_device import open_device

NUM_DECODES = 100


def random_model() -> LlamaForCausalLM:
    """bf16-representable weights, so that all three computations start from the same numbers."""
    shape = dict(SHAPES["llama-3.2-1b"])
    theta = shape.pop("rope_theta")
    config = LlamaConfig(
        **shape,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.device("cuda"):
        warnings.simplefilter("ignore")
        return LlamaForCausalLM(config).bfloat16().eval()


@torch.inference_mode()
def reference_logits(directory: Path, prompt: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of transformers."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).cuda().eval()
    logits: torch.Tensor = model(prompt).logits[0]
    return logits.float()


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of the exact logits."""
    return float((logits.float() - exact).norm() / exact.norm())


def prism_logits(directory: Path, prompt: list[int]) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of one prompt over paged KV: chunks of 100, then one by one."""
    model = ModelConfig(name="m", path=str(directory))
    device = open_device(DeviceConfig(kind="cuda", memory=8 * GiB), [model])
    profile = read_profile(model, device.slab_bytes)
    name = ModelId("m")
    arena = device.new_arena(profile.arena_bytes)
    slabs = device.pool.take(WeightsOwner(name), profile.weight_slabs)
    arena.map([device.pool.handle(slab) for slab in slabs])
    places = Places(tuple(device.pool.address(slab) for slab in slabs), device.slab_bytes)
    link = ThreadLink(device.backend.copier)
    with pack_here(WeightSource(model=name, path=str(directory))) as packed:
        transfer = Transfer(packed, places)
        link.start(transfer)
        link.wait(transfer)
    link.close()
    assert transfer.error is None, transfer.error
    rotary = device.rotary_tensor(profile, arena)
    rotary.copy_(rotary_table(profile.spec.rope, profile.spec.head_dim, profile.spec.max_position))
    kv = KvSpace(profile.kv)
    for slab in device.pool.take(KvOwner(name), 8):
        kv.add_slab(slab)
    blocks = kv.allocate(profile.kv.num_blocks(len(prompt)))
    assert blocks is not None
    decoder = Decoder(profile.spec, device.weight_tensors(profile, arena), rotary)
    runner = device.backend.runner(decoder, device.kv_view(profile.spec, profile.kv), LaneId(0))
    assert isinstance(runner, GpuRunner)
    sizes = [100] * ((len(prompt) - NUM_DECODES) // 100) + [1] * NUM_DECODES
    return steps(runner, blocks, prompt, sizes)


@torch.inference_mode()
def steps(runner: GpuRunner, blocks: list[BlockId], prompt: list[int], sizes: list[int]) -> torch.Tensor:
    """Logits of all tokens, in steps of such sizes."""
    kernels, spec = runner.lane.kernels, runner.model.spec
    runner.lane.tables[1, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    rows, start = [], 0
    for size in sizes:
        positions = torch.arange(start, start + size, dtype=torch.int32, device="cuda")
        split = choose_split(1, spec.num_kv_heads, start + size)
        tiles = None
        if size > 1:
            tiles = torch.tensor(tiles_of([Chunk(0, size, start + size, 1)]), dtype=torch.int32).cuda()
        slots = torch.ones_like(positions)
        plan = GpuPlan(runner.kv, spec.num_heads, slots, positions, int(size == 1), split, tiles)
        ids = torch.tensor(prompt[start : start + size], device="cuda")
        stream = at_once(runner.model.layers(kernels, plan, runner.model.embedded(ids)))
        rows.append(runner.model.logits(kernels, stream))
        start += size
    return torch.cat(rows)


def main() -> None:
    """Prints both relative errors and their ratio."""
    prompt = torch.randint(0, 128256, (1, 700), generator=torch.Generator().manual_seed(1)).cuda()
    with tempfile.TemporaryDirectory() as folder:
        random_model().save_pretrained(folder)
        # loaded anew in each precision: casting a model would round its rotary frequencies too
        theirs = reference_logits(Path(folder), prompt, torch.bfloat16)
        exact = reference_logits(Path(folder), prompt, torch.float32)
        ours = prism_logits(Path(folder), prompt[0].tolist())
    mine, other = relative_error(ours, exact), relative_error(theirs, exact)
    print(f"relative L2 error of logits against fp32: prism {mine:.5f}, transformers bf16 {other:.5f}")
    print(f"ratio {mine / other:.3f} (limit 1.5); finite {bool(torch.isfinite(ours).all())}")
    assert mine <= 1.5 * other


if __name__ == "__main__":
    main()
