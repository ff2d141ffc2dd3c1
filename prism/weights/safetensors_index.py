"""Where each tensor of a checkpoint lies in which file: safetensors headers, read strictly.

The files come from anywhere, so nothing they say is believed before it is checked; every complaint is a
`CheckpointError` naming file and tensor. Only headers are read here, and no tensor's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from prism.errors import CheckpointError
from prism.types import Bytes, DType
from prism.weights.layout import Layout, Source

_SINGLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the format's own limit
_USABLE = frozenset((DType.BF16.value, DType.F16.value, DType.F32.value))
_WHOLE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; `dtype` is the file's word for it, which may be one that Prism cannot use."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    size: Bytes


@dataclass(frozen=True, slots=True)
class Located:
    """A source of the layout, found in a file with the right shape and a usable format."""

    stored: StoredTensor
    dtype: DType


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    if (directory / _SINGLE).exists():
        return read_header(directory / _SINGLE)
    if not (directory / _SHARDED).exists():
        raise CheckpointError(f"holds neither {_SINGLE} nor {_SHARDED}", file=str(directory))
    tensors: dict[str, StoredTensor] = {}
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in _weight_map(directory / _SHARDED).items():
        if shard not in shards:
            shards[shard] = read_header(directory / shard)
        if name not in shards[shard]:
            raise CheckpointError("missing tensor", file=str(directory / shard), tensor=name)
        tensors[name] = shards[shard][name]
    return tensors


def locate(layout: Layout, tensors: Mapping[str, StoredTensor], directory: Path) -> dict[Source, Located]:
    """Every source of the layout. Tensors that the layout does not need are left alone.

    Names are looked up with and without the `model.` prefix: both are in use.
    """
    found = {}
    for entry in layout.entries:
        for source in entry.sources:
            stored = tensors.get(source.name) or tensors.get(source.name.removeprefix("model."))
            if stored is None:
                raise CheckpointError("missing tensor", file=str(directory), tensor=source.name)
            found[source] = _usable(stored, source)
    return found


def _usable(stored: StoredTensor, source: Source) -> Located:
    if stored.shape != source.shape:
        asked = list(source.shape)
        raise _wrong(stored, f"has shape {list(stored.shape)}, config.json asks for {asked}")
    if stored.dtype not in _USABLE:
        known = ", ".join(sorted(_USABLE))
        raise _wrong(stored, f"dtype {stored.dtype} not supported; known: {known}")
    return Located(stored, DType(stored.dtype))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, which must fill its data section without gaps."""
    header, begin, end = _header(file)
    tensors = [_tensor(file, name, value, begin) for name, value in header.items() if name != "__metadata__"]
    at = begin
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset + tensor.size > end:
            raise _wrong(tensor, f"ends {tensor.offset + tensor.size - end} bytes past the file (truncated?)")
        if tensor.offset != at:
            raise _wrong(tensor, "overlaps another tensor" if tensor.offset < at else "follows a gap")
        at = tensor.offset + tensor.size
    if at != end:
        raise CheckpointError(f"{end - at} bytes belong to no tensor", file=str(file))
    return {tensor.name: tensor for tensor in tensors}


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header's JSON, and where the data section begins and ends in the file."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER):
                problem = f"a header of {length} bytes does not fit a file of {size} (truncated?)"
                raise CheckpointError(problem, file=str(file))
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(file)) from None
    return _json_object(file, text, "header"), _LENGTH_BYTES + length, size


def _tensor(file: Path, name: str, value: Any, begin: int) -> StoredTensor:
    """One line of a header, checked on its own."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [first, last]}:
            numbers = [*shape, first, last]
        case _:
            raise CheckpointError("needs dtype, shape and two data_offsets", file=str(file), tensor=name)
    if any(type(number) is not int or number < 0 for number in numbers) or last < first:
        raise CheckpointError(f"bad shape {shape} or offsets {[first, last]}", file=str(file), tensor=name)
    tensor = StoredTensor(file, name, dtype, tuple(shape), begin + first, Bytes(last - first))
    if dtype in _WHOLE_BYTES and prod(shape) * _WHOLE_BYTES[dtype] != tensor.size:
        raise _wrong(tensor, f"{tensor.size} bytes cannot hold {dtype} of shape {shape}")
    return tensor


def _weight_map(file: Path) -> dict[str, str]:
    """Tensor name -> shard's file name, which lies in the same directory and nowhere else."""
    try:
        index = _json_object(file, file.read_bytes(), "index")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=str(file)) from None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError("has no weight_map", file=str(file))
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        if not plain or "\0" in shard:
            raise CheckpointError(f"{shard!r} is no shard's file name", file=str(file), tensor=name)
    return weight_map


def _json_object(file: Path, text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name is used twice")
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not readable as JSON: {error}", file=str(file)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object", file=str(file))
    return value


def _wrong(tensor: StoredTensor, problem: str) -> CheckpointError:
    return CheckpointError(problem, file=str(tensor.file), tensor=tensor.name)
