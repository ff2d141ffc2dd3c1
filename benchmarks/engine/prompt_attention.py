"""Attention alone of steps with prompts on one GPU.

Usage: python benchmarks/engine/prompt_attention.py [--output results.json]
One layer of a model with 32 query and 8 KV heads (8 and 1 where they are 256 wide), normal random numbers in
bf16; blocks of 16 tokens in a shuffled order. A CUDA graph has ten of them; medians of 20 replays. `us` and
`tflop_s` are of one layer; half of a prompt's square is counted, since nobody sees what comes later.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from figures import replay_ms

from prism.attention.gpu.prefill import Chunk, prefill_attention, tiles_of

TOKENS, LAYERS = 16, 10


class Case(NamedTuple):
    """`prompts` chunks of `query` tokens, behind `before` that are in the cache."""

    heads: int
    kv_heads: int
    dim: int
    prompts: int
    query: int
    before: int = 0


CASES = (
    *(
        Case(32, 8, dim, *rest)
        for dim in (128, 64)
        for rest in ((1, 512), (1, 4000), (1, 2000, 6000), (8, 512))
    ),
    Case(8, 1, 256, 1, 4000),
    Case(8, 1, 256, 1, 2000, 2000),
)


def attention(case: Case) -> dict[str, Any]:
    """Microseconds of one layer, and operations a second."""
    heads, kv_heads, dim, prompts, query, before = case
    context = before + query
    blocks = -(-context // TOKENS)
    shape = (prompts * blocks, 2, TOKENS, kv_heads, dim)
    pages = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    tables = torch.zeros(prompts + 1, -(-blocks // 16) * 16, dtype=torch.int32, device="cuda")
    places = torch.randperm(prompts * blocks, dtype=torch.int32, device="cuda")
    tables[1:, :blocks] = places.view(prompts, blocks)
    qkv = torch.randn(prompts * query, heads + 2 * kv_heads, dim, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(prompts * query, heads, dim, dtype=torch.bfloat16, device="cuda")
    chunks = [Chunk(i * query, query, context, i + 1) for i in range(prompts)]
    tiles = torch.tensor(tiles_of(chunks), dtype=torch.int32, device="cuda")

    def run() -> None:
        prefill_attention(qkv, heads, pages, tables, tiles, out)

    run()  # what is compiled and loaded at first is no part of a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            run()
    seconds = replay_ms(graph) / 1e3 / LAYERS
    operations = 4 * dim * heads * prompts * query * (before + (query + 1) / 2)
    return case._asdict() | {
        "us": round(seconds * 1e6, 1),
        "tflop_s": round(operations / seconds / 1e12),
    }


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["attention"] = []
    with torch.inference_mode():
        for case in CASES:
            results["attention"].append(attention(case))
            print(json.dumps(results["attention"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
