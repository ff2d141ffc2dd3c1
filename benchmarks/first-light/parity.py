"""Logits of a random Llama-3.2-1B shape in bf16 on the GPU against fp32, beside transformers' own bf16."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from prism.attention.kernels import BatchLayout
from prism.config import DeviceConfig, ModelConfig
from prism.engine.kv_blocks import KvSpace
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.models.decoder import Decoder
from prism.models.rotary import rotary_table
from prism.types import GiB, ModelId
from prism.weights.client import pack_here
from prism.weights.link import ThreadLink
from prism.weights.protocol import WeightSource
from prism.weights.transfers import Places, Transfer
from prism.worker.models import read_profile
from prism.worker.open_device import open_device


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


def reference_logits(directory: Path, prompt: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of transformers."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).cuda().eval()
    return model(prompt).logits[0].float()


def relative_error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference over that of the exact logits."""
    return float((logits.float() - exact).norm() / exact.norm())


@torch.inference_mode()
def prism_logits(directory: Path, prompt: list[int]) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of one prompt, computed in chunks of 100 over paged KV."""
    device = open_device(DeviceConfig(kind="cuda", memory=8 * GiB))
    model = ModelConfig(name="m", path=str(directory))
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
    kernels, view = device.kernels_for(profile.spec), device.kv_view(profile.spec, profile.kv)
    rows = []
    for start in range(0, len(prompt), 100):
        part = prompt[start : start + 100]
        fresh = tuple(blocks) if start == 0 else ()
        layout = BatchLayout([len(part)], [start + len(part)], [blocks], fresh)
        plan = kernels.plan(layout, view, profile.spec.num_heads)
        tokens = torch.tensor(part, device="cuda")
        positions = torch.arange(start, start + len(part), device="cuda")
        hidden = decoder.hidden(kernels, plan, tokens, positions)
        rows.append(decoder.logits(kernels, hidden))
    return torch.cat(rows)


def main() -> None:
    """Prints both relative errors and their ratio."""
    prompt = torch.randint(0, 128256, (1, 700), generator=torch.Generator().manual_seed(1)).cuda()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
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
