"""What the store, its packers and its clients say to one another, as JSON (msgspec tagged unions).

 store --PackJob--> packer            as its only argument
 packer --PackEvent--> store          one line each on standard output
 client --Fetch--> store              one packet on the store's socket
 store --Manifest, NotPacked--> client    one packet; a manifest comes with the memory file's descriptor
 store --Recall--> client             one packet, perhaps, on the connection of a cached loan

A client keeps its connection open for as long as it uses the memory: the store evicts nothing in use. Who
keeps weights only because they may be of use says so (`cached`) and closes the connection after `Recall`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from prism.types import Bytes, ModelId, Quantization
from prism.weights.checksum import table_bytes


class WeightSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where one model's weights come from; the fields are those of the model's configuration."""

    model: ModelId
    path: str
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    dtype: str = "auto"
    quantization: Quantization = "none"


class PackJob(msgspec.Struct, frozen=True, kw_only=True):
    """Pack these weights into the memory file `fd`, whose size is `file_bytes` of `total_bytes`."""

    source: WeightSource
    fd: int
    total_bytes: int


class _Tagged(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Progress(_Tagged, frozen=True, kw_only=True):
    """So many bytes are in place; with 0 the headers are good and the memory is reserved."""

    done_bytes: int


class Packed(_Tagged, frozen=True, kw_only=True):
    """All bytes and all checksums are in place."""


class BadCheckpoint(_Tagged, frozen=True, kw_only=True):
    """The checkpoint cannot be packed; the fields are those of `CheckpointError`."""

    message: str
    file: str
    tensor: str | None


class NoMemory(_Tagged, frozen=True, kw_only=True):
    """The memory file's pages could not be reserved."""

    message: str


class Fetch(_Tagged, frozen=True, kw_only=True):
    """Lend me this model's packed weights."""

    model: str
    cached: bool = False
    """The store may have them back at any time: it sends `Recall` when it wants the memory."""


class Manifest(_Tagged, frozen=True, kw_only=True):
    """The packed weights in the memory file: the layout's bytes, then one 64-bit checksum per chunk."""

    model: str
    total_bytes: int
    fingerprint: str
    """That of the layout."""


class NotPacked(_Tagged, frozen=True, kw_only=True):
    """The store does not hold these weights (any more): ask for them to be packed again."""

    model: str


class Recall(_Tagged, frozen=True, kw_only=True):
    """The store wants the memory of a cached loan: unmap it and close the connection."""

    model: str


PackEvent = Progress | Packed | BadCheckpoint | NoMemory
Lent = Manifest | NotPacked


def file_bytes(total_bytes: Bytes) -> Bytes:
    """Size of the memory file for so many bytes of weights."""
    return Bytes(total_bytes + table_bytes(total_bytes))
