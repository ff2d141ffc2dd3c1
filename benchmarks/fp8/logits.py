"""Logits of one prompt: ours over paged KV, and transformers' in fp32 over the same unquantised weights."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from llama import SHAPES
from local import LocalModel

from prism.attention.gpu.decode import choose_split
from prism.attention.gpu.kernels import GpuPlan
from prism.attention.gpu.prefill import Chunk, tiles_of
from prism.attention.kernels import Weight
from prism.engine.gpu.runner import GpuRunner
from prism.models.decoder import at_once


@torch.inference_mode()
def reference(model: LocalModel, shape: str, prompt: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]` of transformers in fp32 over what the model's weights stand for.

    It takes 4 bytes a weight beside the pool.
    """
    given = {key: value for key, value in SHAPES[shape].items() if key not in ("rope_theta", "torch_dtype")}
    theta = SHAPES[shape]["rope_theta"]
    config = LlamaConfig(**given, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with warnings.catch_warnings(), torch.device("cuda"):
        warnings.simplefilter("ignore")
        exact = LlamaForCausalLM(config).float().eval()
    state = exact.state_dict()
    for entry in model.profile.weights.entries:
        if not entry.sources:
            continue
        weight = Weight(model.tensors[entry.name], model.tensors.get(f"{entry.name}_scale"))
        parts = torch.split(weight.plain(torch.float32), [source.shape[0] for source in entry.sources])
        for source, part in zip(entry.sources, parts, strict=True):
            state[source.name].copy_(part)
    logits: torch.Tensor = exact(torch.tensor([prompt], device="cuda")).logits[0]
    return logits


@torch.inference_mode()
def ours(model: LocalModel, prompt: list[int], sizes: list[int]) -> torch.Tensor:
    """`[tokens, vocabulary]` in steps of such sizes. Steps of one token take the matrix-vector kernels."""
    runner = model.engine.runner
    assert isinstance(runner, GpuRunner)
    kernels, spec = runner.lane.kernels, runner.model.spec
    blocks = model.engine.kv.allocate(model.profile.kv.num_blocks(len(prompt)))
    assert blocks is not None
    rows, start = [], 0
    with torch.cuda.stream(runner.lane.stream):
        runner.lane.tables[1, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
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
            rows.append(runner.model.logits(kernels, stream).clone())
            start += size
        result = torch.cat(rows).float()
    torch.cuda.synchronize()
    return result


def compare(logits: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Relative L2 error, the share of equal likeliest tokens, and by how much the others were less likely."""
    chosen = logits.argmax(1)
    lost = exact.amax(1) - exact.gather(1, chosen[:, None])[:, 0]
    return {
        "relative_l2": round(float((logits - exact).norm() / exact.norm()), 5),
        "same_greedy": round(float((chosen == exact.argmax(1)).float().mean()), 4),
        "lost_deviations": round(float((lost / exact.std(1)).mean()), 4),
    }
