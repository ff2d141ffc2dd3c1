"""Random weights that need no checkpoint: plausible in size and spread, equal for equal model names.

Drawing 16 GB of normal numbers would take minutes. One block of them is drawn, and every tensor is a run
through the block from another place; the block's length is odd, so no two rows of a matrix are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from math import prod, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.types import Bytes, DType
from prism.weights.convert import convert
from prism.weights.layout import Entry, Layout
from prism.weights.pieces import Piece, Span, spans

_BLOCK = (1 << 20) + 7


class _Spread(NamedTuple):
    mean: float
    deviation: float


def dummy_pieces(layout: Layout, model: str) -> Iterator[Piece]:
    """Random content for every entry."""
    rng = np.random.default_rng(int.from_bytes(blake2b(model.encode(), digest_size=8).digest()))
    normal = rng.standard_normal(_BLOCK, np.float32)
    blocks: dict[tuple[_Spread, DType], NDArray[np.generic]] = {}
    for entry in layout.entries:
        key = _spread(entry), entry.dtype
        if key not in blocks:
            blocks[key] = _block(normal, *key)
        start = int(rng.integers(_BLOCK))
        for span in spans(prod(entry.shape), entry.dtype):
            fill = partial(_fill, blocks[key], start, span)
            yield Piece(
                Bytes(entry.offset + span.first * entry.dtype.itemsize),
                Bytes(span.num_numbers * entry.dtype.itemsize),
                fill,
            )


def _spread(entry: Entry) -> _Spread:
    """Norms are near 1; matrices keep the size of what they multiply, so logits stay within a few units."""
    if entry.name.endswith("norm"):
        return _Spread(1.0, 0.1)
    if entry.name.endswith("bias"):
        return _Spread(0.0, 0.02)
    return _Spread(0.0, min(0.1, max(0.02, 1 / sqrt(entry.shape[1]))))


def _block(normal: NDArray[np.float32], spread: _Spread, dtype: DType) -> NDArray[np.generic]:
    numbers = normal * np.float32(spread.deviation) + np.float32(spread.mean)
    return convert(numbers, DType.F32, dtype)


def _fill(block: NDArray[np.generic], start: int, span: Span, target: NDArray[np.uint8]) -> None:
    """Numbers `first`, `first + 1`, ... of an endless repetition of the block."""
    numbers = target.view(block.dtype)
    done, at = 0, (start + span.first) % len(block)
    while done < span.num_numbers:
        length = min(span.num_numbers - done, len(block) - at)
        numbers[done : done + length] = block[at : at + length]
        done, at = done + length, 0
