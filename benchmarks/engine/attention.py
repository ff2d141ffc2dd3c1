"""Attention alone of a decode step on one GPU: how fast it reads KV.

Usage: python benchmarks/engine/attention.py [--batches 1,8,64] [--context 1088] [--output results.json]
KV of a Llama-3-8B shape, 32 layers in bf16, normal random numbers; blocks of 16 tokens in a shuffled order. A
CUDA graph has one attention for each layer, as a step has; medians of 20 replays. One sequence has 143 MB, of
which a cache may hold a part.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from figures import copy_bandwidth, replay_ms

from prism.attention.gpu.decode import SCRATCH_BYTES, choose_split, decode_attention

LAYERS, HEADS, KV_HEADS, DIM, TOKENS = 32, 32, 8, 128, 16


def attention(batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of all layers, and bytes of KV that they read a second."""
    blocks = -(-context // TOKENS)
    pages = torch.empty(
        batch * blocks, LAYERS, 2, TOKENS, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda"
    ).normal_()
    places = torch.randperm(batch * blocks, dtype=torch.int32, device="cuda")
    width = -(-blocks // 16) * 16  # as a lane's tables
    tables = torch.zeros(batch + 1, width, dtype=torch.int32, device="cuda")  # row 0 is padding's
    tables[1:, :blocks] = places.view(batch, blocks)
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device="cuda")
    positions = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    q = torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    split = choose_split(batch, KV_HEADS, context)

    def step() -> None:
        for layer in range(LAYERS):
            decode_attention(q, pages[:, layer], tables, slots, positions, scratch, split, out)

    step()  # what is compiled and loaded at first is no part of a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seconds = replay_ms(graph) / 1e3
    read = batch * context * LAYERS * 2 * KV_HEADS * DIM * 2
    return {
        "batch": batch,
        "context": context,
        "kv_gb": round(read / 1e9, 2),
        "ms": round(seconds * 1e3, 3),
        "tb_s": round(read / seconds / 1e12, 3),
    }


def main() -> None:
    """Prints a line for each batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--context", type=int, default=1088)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["copy_tb_s"] = round(copy_bandwidth() / 1e12, 3)
    torch.cuda.empty_cache()
    results["attention"] = []
    with torch.inference_mode():
        for batch in map(int, options.batches.split(",")):
            results["attention"].append(attention(batch, options.context))
            print(json.dumps(results["attention"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
