"""The checksums of checksum.py, computed by torch where the bytes are (packers never import this)."""

from __future__ import annotations

import torch

from prism.types import Bytes
from prism.weights.checksum import CHUNK_BYTES, WORD_BYTES

_CHUNK_WORDS = CHUNK_BYTES // WORD_BYTES


def torch_factors(device: torch.device) -> torch.Tensor:
    """The factors of a whole chunk: [CHUNK_BYTES / 8] int64."""
    return torch.arange(1, 2 * _CHUNK_WORDS, 2, dtype=torch.int64, device=device)


def add_torch_checksums(
    data: torch.Tensor, begin: Bytes, factors: torch.Tensor, products: torch.Tensor, sums: torch.Tensor
) -> None:
    """Add what `data` [bytes] uint8, found at byte `begin`, gives to the checksums in `sums` [chunks] int64.

    They are the same 64 bits, as signed numbers. `products` [at least bytes / 8] int64 is written. On a GPU
    all of it is queued on the current stream.
    """
    words = data.view(torch.int64)
    products = products[: len(words)]
    index, first = divmod(begin // WORD_BYTES, _CHUNK_WORDS)
    head = min(len(words), -first % _CHUNK_WORDS)
    if head:
        torch.mul(words[:head], factors[first : first + head], out=products[:head])
        sums[index] += products[:head].sum()
        index += 1
    whole = (len(words) - head) // _CHUNK_WORDS
    if whole:
        chunks = slice(head, head + whole * _CHUNK_WORDS)
        by_chunk = products[chunks].view(whole, _CHUNK_WORDS)
        torch.mul(words[chunks].view(whole, _CHUNK_WORDS), factors, out=by_chunk)
        sums[index : index + whole] += by_chunk.sum(dim=1)
        index += whole
    if rest := len(words) - head - whole * _CHUNK_WORDS:
        torch.mul(words[-rest:], factors[:rest], out=products[-rest:])
        sums[index] += products[-rest:].sum()
