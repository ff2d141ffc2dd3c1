"""Shapes of models, and which of them the models of a trace have.

The published evaluation serves 58 models: 43 of 1-3B, 8 of 4-8B, 3 of 9-30B and 4 of 31-70B, the last ones
over several GPUs. This server runs a model on one device, so the largest shape here is 32B, which fits one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism.costs import Shape
from prism.types import Bytes, ModelId


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights."""

    name: str
    shape: Shape
    context: int
    """Most tokens of prompt and output."""


def _architecture(
    name: str,
    billions: float,
    embedding: float,
    tied: bool,
    layers: int,
    kv_width: int,
    width: int,
    head: int,
    context: int,
) -> Architecture:
    """In bf16. `billions` of all weights and `embedding` of the input embedding among them; of attention the
    widths of all KV heads, of all query heads and of one."""
    read = billions if tied else billions - embedding
    return Architecture(
        name,
        Shape(
            num_parameters=read * 1e9,
            weight_bytes=Bytes(round(2e9 * billions)),
            read_bytes=Bytes(round(2e9 * read)),
            kv_bytes_per_token=Bytes(layers * 2 * kv_width * 2),
            num_layers=layers,
            attention_width=width,
            position_bytes=Bytes(4 * head),
        ),
        context,
    )


ARCHITECTURES = {
    a.name: a
    for a in (
        _architecture("llama-3.2-1b", 1.236, 0.263, True, 16, 512, 2048, 64, 131072),
        _architecture("qwen2.5-1.5b", 1.544, 0.233, True, 28, 256, 1536, 128, 32768),
        _architecture("llama-3.2-3b", 3.213, 0.394, True, 28, 1024, 3072, 128, 131072),
        _architecture("llama-3-8b", 8.030, 0.525, False, 32, 1024, 4096, 128, 8192),
        _architecture("qwen2.5-14b", 14.770, 0.779, False, 48, 1024, 5120, 128, 32768),
        _architecture("qwen2.5-32b", 32.764, 0.779, False, 64, 1024, 5120, 128, 32768),
    )
}

PUBLISHED_MIX: tuple[tuple[int, tuple[str, ...]], ...] = (
    (43, ("llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b")),
    (8, ("llama-3-8b",)),
    (3, ("qwen2.5-14b",)),
    (4, ("qwen2.5-32b",)),
)
"""Models of each size class, and the shapes that stand for them in turns."""


def published_mix(models: Sequence[ModelId]) -> dict[ModelId, str]:
    """A shape for each model, the size classes in the published proportion.

    Classes are spread evenly over `models`, which come most popular first, so that size and popularity have
    nothing to do with each other.
    """
    counts = _apportion(len(models), [count for count, _ in PUBLISHED_MIX])
    places = sorted(
        ((index + 0.5) / count, kind, index) for kind, count in enumerate(counts) for index in range(count)
    )
    result = {}
    for model, (_, kind, index) in zip(models, places, strict=True):
        names = PUBLISHED_MIX[kind][1]
        result[model] = names[index % len(names)]
    return result


def _apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to `weights`, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
