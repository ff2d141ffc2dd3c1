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
from prism.weights.pieces import Piece, QuantisedPlace, Span, row_spans, spans
from prism.weights.quantise import quantise

_BLOCK = (1 << 20) + 7


class _Spread(NamedTuple):
    mean: float
    deviation: float


class _Run(NamedTuple):
    """One tensor: an endless repetition of a block, from `start` on."""

    block: NDArray[np.generic]
    dtype: DType
    start: int

    def write(self, span: Span, numbers: NDArray[np.generic]) -> None:
        """Some of its numbers."""
        done, at = 0, (self.start + span.first) % len(self.block)
        while done < span.num_numbers:
            length = min(span.num_numbers - done, len(self.block) - at)
            numbers[done : done + length] = self.block[at : at + length]
            done, at = done + length, 0


def dummy_pieces(layout: Layout, model: str, plain: DType) -> Iterator[Piece]:
    """Random content for every entry. Quantised matrices are those of the format `plain`, quantised."""
    rng = np.random.default_rng(int.from_bytes(blake2b(model.encode(), digest_size=8).digest()))
    normal = rng.standard_normal(_BLOCK, np.float32)
    blocks: dict[tuple[_Spread, DType], NDArray[np.generic]] = {}
    scales = layout.scales
    for entry in layout.entries:
        if not entry.sources:
            continue  # scales come with their matrix
        dtype = plain if entry.name in scales else entry.dtype
        key = _spread(entry), dtype
        if key not in blocks:
            blocks[key] = _block(normal, *key)
        run = _Run(blocks[key], dtype, int(rng.integers(_BLOCK)))
        if entry.name in scales:
            yield from _quantised_pieces(run, entry, scales[entry.name])
            continue
        for span in spans(prod(entry.shape), dtype):
            begin, size = entry.offset + span.first * dtype.itemsize, span.num_numbers * dtype.itemsize
            yield Piece(Bytes(begin + size), partial(_fill, run, span, slice(begin, begin + size)))


def _quantised_pieces(run: _Run, entry: Entry, scales: Entry) -> Iterator[Piece]:
    for rows in row_spans(entry, entry.shape[0]):
        place = QuantisedPlace.of(entry, scales, rows)
        span = Span(rows.first * entry.shape[1], rows.num_numbers * entry.shape[1])
        yield Piece(place.values.stop, partial(_fill_quantised, run, span, place))


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


def _fill(run: _Run, span: Span, place: slice, buffer: NDArray[np.uint8]) -> None:
    run.write(span, buffer[place].view(run.block.dtype))


def _fill_quantised(run: _Run, span: Span, place: QuantisedPlace, buffer: NDArray[np.uint8]) -> None:
    numbers = np.empty(span.num_numbers, run.block.dtype)
    run.write(span, numbers)
    wide = convert(numbers, run.dtype, DType.F32).view(np.float32)
    quantise(wide.reshape(-1, place.columns), place.within(buffer))
