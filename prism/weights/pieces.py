"""The work of packing, cut into pieces that threads can do in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prism.errors import CheckpointError
from prism.types import Bytes, DType, MiB
from prism.weights.convert import convert, storage_dtype
from prism.weights.layout import Layout, Source
from prism.weights.safetensors_index import Located

PIECE_BYTES = 16 * MiB


class Piece(NamedTuple):
    """`fill` writes the bytes of `[offset, offset + size)` into the array it is given."""

    offset: Bytes
    size: Bytes
    fill: Callable[[NDArray[np.uint8]], None]


class Span(NamedTuple):
    """Consecutive numbers of one tensor, as much as one piece takes."""

    first: int
    num_numbers: int


def spans(num_numbers: int, dtype: DType) -> Iterator[Span]:
    """A tensor's numbers, cut to pieces."""
    step = PIECE_BYTES // dtype.itemsize
    for first in range(0, num_numbers, step):
        yield Span(first, min(step, num_numbers - first))


def checkpoint_pieces(layout: Layout, located: Mapping[Source, Located]) -> Iterator[Piece]:
    """Everything that is to be read from the checkpoint's files, converted where formats differ."""
    for entry in layout.entries:
        offset, itemsize = entry.offset, entry.dtype.itemsize
        for source in entry.sources:
            for span in spans(prod(source.shape), entry.dtype):
                size = Bytes(span.num_numbers * itemsize)
                fill = partial(_read, located[source], entry.dtype, span)
                yield Piece(Bytes(offset + span.first * itemsize), size, fill)
            offset = Bytes(offset + prod(source.shape) * itemsize)


def _read(located: Located, dtype: DType, span: Span, target: NDArray[np.uint8]) -> None:
    if located.dtype is dtype:
        _read_exactly(located, span, target)
        return
    raw = np.empty(span.num_numbers * located.dtype.itemsize, np.uint8)
    _read_exactly(located, span, raw)
    numbers = raw.view(storage_dtype(located.dtype))
    target.view(storage_dtype(dtype))[:] = convert(numbers, located.dtype, dtype)


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
