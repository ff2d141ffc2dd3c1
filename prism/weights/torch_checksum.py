"""The checksums of checksum.py, computed by torch where the bytes are (packers never import this)."""

from __future__ import annotations

import torch

from prism.weights.checksum import CHUNK_BYTES, WORD_BYTES

_CHUNK_WORDS = CHUNK_BYTES // WORD_BYTES


def torch_factors(device: torch.device) -> torch.Tensor:
    """The factors of a whole chunk: [CHUNK_BYTES / 8] int64."""
    return torch.arange(1, 2 * _CHUNK_WORDS, 2, dtype=torch.int64, device=device)


def torch_checksums(data: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """Checksums of consecutive chunks: [bytes] uint8 -> `out` [chunks] int64 (the same 64 bits, as signed).

    On a GPU it is queued on the current stream and takes a temporary buffer as large as `data`.
    """
    words = data.view(torch.int64)
    whole = len(words) // _CHUNK_WORDS
    chunks = words[: whole * _CHUNK_WORDS].view(whole, _CHUNK_WORDS)
    torch.sum(chunks * factors, dim=1, out=out[:whole])
    if rest := words[whole * _CHUNK_WORDS :].numel():
        out[whole] = (words[-rest:] * factors[:rest]).sum()
