"""A layer's products of few rows on one GPU: what torch calls without a bias, and with one of zeros.

Usage: python benchmarks/engine/products.py [--shapes 8b,1b,14b] [--rows 8,16,32,64] [--output results.json]
With a bias torch calls cuBLASLt. Weights are random; so many lie side by side that no cache holds them when
their turn comes. Times are those of a CUDA graph with all of them, replayed: medians of 20.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from figures import replay_ms
from torch import Tensor

MATRICES = {
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "14b": {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (34816, 5120), "down": (5120, 17408)},
}
"""Outputs and inputs: Llama-3-8B, Llama-3.2-1B, Qwen3-14B."""
TOTAL = 1 << 29
"""Bytes of all copies of a matrix; an H200's cache has 50 MB."""
Pairs = dict[int, tuple[float, float]]
"""Microseconds by number of rows, without a bias and with one."""


def product_us(x: Tensor, weights: Tensor, bias: Tensor | None) -> float:
    """Microseconds of the product with one of `weights [copies, outputs, inputs]`."""
    graph = torch.cuda.CUDAGraph()
    for weight in weights[:2]:  # what is made at first is no part of a graph
        F.linear(x, weight, bias)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for weight in weights:
            F.linear(x, weight, bias)
    return replay_ms(graph) / len(weights) * 1e3


def measure(shape: str, rows: list[int]) -> dict[str, Pairs]:
    """By matrix and number of rows, without a bias and with one."""
    figures: dict[str, Pairs] = {}
    for name, (outputs, inputs) in MATRICES[shape].items():
        copies = -(-TOTAL // (2 * outputs * inputs))
        weights = torch.empty(copies, outputs, inputs, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
        zeros = torch.zeros(outputs, dtype=torch.bfloat16, device="cuda")
        for count in rows:
            x = torch.randn(count, inputs, dtype=torch.bfloat16, device="cuda")
            pair = product_us(x, weights, None), product_us(x, weights, zeros)
            figures.setdefault(name, {})[count] = (round(pair[0], 1), round(pair[1], 1))
    return figures


def layer(figures: dict[str, Pairs], rows: list[int]) -> Pairs:
    """All of its products together."""
    sums = {}
    for count in rows:
        plain, lt = zip(*(pairs[count] for pairs in figures.values()), strict=True)
        sums[count] = sum(plain), sum(lt)
    return sums


def main() -> None:
    """Prints a line for each matrix, and one for all of a layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="8b,1b,14b")
    parser.add_argument("--rows", default="8,16,24,32,48,64,96,112,128")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows, shapes = [int(count) for count in options.rows.split(",")], options.shapes.split(",")
    if unknown := set(shapes) - set(MATRICES):
        parser.error(f"--shapes: nothing is called {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print("rows", *rows)
    with torch.inference_mode():
        for shape in shapes:
            figures = results[shape] = measure(shape, rows)
            for name, pairs in (*figures.items(), ("layer", layer(figures, rows))):
                print(shape, name, *(f"{plain:.1f}/{lt:.1f}" for plain, lt in pairs.values()), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
