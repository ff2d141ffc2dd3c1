"""The work of packing, cut into pieces that threads can do in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.errors import CheckpointError
from prism.types import Bytes, DType, MiB
from prism.weights.convert import convert, storage_dtype
from prism.weights.layout import Entry, Layout, Source
from prism.weights.quantise import NotFinite, Quantised, quantise
from prism.weights.safetensors_index import Located

PIECE_BYTES = 16 * MiB


class Piece(NamedTuple):
    """`fill` writes its part of the whole buffer that it is given."""

    end: Bytes
    """Where the part ends. What lies before is in place once this piece and all before it are done."""
    fill: Callable[[NDArray[np.uint8]], None]


class Span(NamedTuple):
    """Consecutive numbers of one tensor, as much as one piece takes."""

    first: int
    num_numbers: int


class QuantisedPlace(NamedTuple):
    """Some rows of a quantised matrix in the buffer: bytes of their values and of their scales."""

    values: slice
    scales: slice
    columns: int

    @classmethod
    def of(cls, entry: Entry, scales: Entry, rows: Span) -> QuantisedPlace:
        """Those of an entry's rows."""
        columns, end = entry.shape[1], rows.first + rows.num_numbers
        return cls(
            slice(entry.offset + rows.first * columns, entry.offset + end * columns),
            slice(scales.offset + rows.first * 4, scales.offset + end * 4),
            columns,
        )

    def within(self, buffer: NDArray[np.uint8]) -> Quantised:
        """The same as arrays."""
        return Quantised(buffer[self.values].reshape(-1, self.columns), buffer[self.scales].view(np.float32))


def spans(num_numbers: int, dtype: DType) -> Iterator[Span]:
    """A tensor's numbers, cut to pieces."""
    step = PIECE_BYTES // dtype.itemsize
    for first in range(0, num_numbers, step):
        yield Span(first, min(step, num_numbers - first))


def row_spans(entry: Entry, num_rows: int) -> Iterator[Span]:
    """Whole rows of a matrix, cut to pieces; spans count rows."""
    step = max(1, PIECE_BYTES // (DType.F32.itemsize * entry.shape[1]))
    for first in range(0, num_rows, step):
        yield Span(first, min(step, num_rows - first))


def checkpoint_pieces(layout: Layout, located: Mapping[Source, Located]) -> Iterator[Piece]:
    """Everything that is to be read from the checkpoint's files, converted where formats differ."""
    scales = layout.scales
    for entry in layout.entries:
        if entry.name in scales:
            yield from _quantised_pieces(entry, scales[entry.name], located)
            continue
        offset, itemsize = entry.offset, entry.dtype.itemsize
        for source in entry.sources:
            for span in spans(prod(source.shape), entry.dtype):
                begin, size = offset + span.first * itemsize, span.num_numbers * itemsize
                fill = partial(_read, located[source], entry.dtype, span, slice(begin, begin + size))
                yield Piece(Bytes(begin + size), fill)
            offset = Bytes(offset + prod(source.shape) * itemsize)


def _quantised_pieces(entry: Entry, scales: Entry, located: Mapping[Source, Located]) -> Iterator[Piece]:
    above = 0  # rows of the sources before
    for source in entry.sources:
        for span in row_spans(entry, source.shape[0]):
            place = QuantisedPlace.of(entry, scales, Span(above + span.first, span.num_numbers))
            fill = partial(_read_quantised, located[source], span, place)
            yield Piece(place.values.stop, fill)
        above += source.shape[0]


def _read(located: Located, dtype: DType, span: Span, place: slice, buffer: NDArray[np.uint8]) -> None:
    target = buffer[place]
    if located.dtype is dtype:
        _read_exactly(located, span, target)
        return
    target.view(storage_dtype(dtype))[:] = convert(_numbers(located, span), located.dtype, dtype)


def _read_quantised(located: Located, rows: Span, place: QuantisedPlace, buffer: NDArray[np.uint8]) -> None:
    """Always from the checkpoint's own numbers, whatever the model computes in."""
    columns = located.stored.shape[1]
    numbers = _numbers(located, Span(rows.first * columns, rows.num_numbers * columns))
    wide = convert(numbers, located.dtype, DType.F32).view(np.float32).reshape(-1, columns)
    try:
        quantise(wide, place.within(buffer))
    except NotFinite as error:
        problem = f"row {rows.first + error.row} has a number that is not finite: fp8 has no scale for it"
        raise CheckpointError(problem, file=str(located.stored.file), tensor=located.stored.name) from None


def _numbers(located: Located, span: Span) -> NDArray[Any]:
    raw = np.empty(span.num_numbers * located.dtype.itemsize, np.uint8)
    _read_exactly(located, span, raw)
    return raw.view(storage_dtype(located.dtype))


def _read_exactly(located: Located, span: Span, target: NDArray[np.uint8]) -> None:
    """Read the span's bytes; the file may have shrunk since its header was checked."""
    stored, view, done = located.stored, target.data, 0
    try:
        with Path(stored.file).open("rb", buffering=0) as stream:
            stream.seek(stored.offset + span.first * located.dtype.itemsize)
            while done < len(view):
                if not (count := stream.readinto(view[done:])):
                    raise CheckpointError("the file ends early", file=str(stored.file), tensor=stored.name)
                done += count
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise CheckpointError(problem, file=str(stored.file), tensor=stored.name) from None
