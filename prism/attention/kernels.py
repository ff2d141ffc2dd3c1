"""The interface between models and what a device can do fast.

A `Kernels` object belongs to one lane: it owns the scratch memory of its operations. A backend makes a plan
once a step; it serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prism.types import BlockId


@dataclass(frozen=True, slots=True)
class KvView:
    """A model's view of the window.

    `pages` is `[unit, layer, 2, token, kv_head, head_dim]` with a page stride of one unit, so pages
    overlap: only those that start a block of this model mean anything. Most of it may be unmapped or
    belong to others: never print, copy or fill it as a whole.
    """

    pages: Tensor

    @property
    def tokens_per_block(self) -> int:
        """Tokens in one page."""
        return self.pages.shape[3]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Who is where in a step, as plain lists, one entry for each sequence of the batch."""

    query_lens: list[int]
    """Tokens computed in this step."""
    context_lens: list[int]
    """Tokens with KV after this step, these ones included."""
    tables: list[list[BlockId]]
    """Blocks of the whole context, in order."""
    new_blocks: Sequence[BlockId] = ()
    """Blocks that receive their first token in this step; what they held before is garbage."""


class AttentionPlan(Protocol):
    """What a backend computed for one batch; only that backend looks inside."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states between halves of layers: `[tokens, hidden]`, plus what the next norm still adds."""

    residual: Tensor
    delta: Tensor | None = None

    def rows(self, index: Tensor) -> Stream:
        """Some tokens only."""
        return Stream(self.residual[index], None if self.delta is None else self.delta[index])


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix `[out, in]` that rows are multiplied by, transposed.

    With a `scale`, fp32 `[out]`, the values are fp8 and row i of the matrix is `values[i] * scale[i]`.
    """

    values: Tensor
    scale: Tensor | None = None

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The matrix itself; a quantised one is written out anew."""
        if self.scale is None:
            return self.values
        return (self.values.to(torch.float32) * self.scale[:, None]).to(dtype)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights `[dim]` of the norms of query and key heads."""

    query: Tensor
    key: Tensor
    eps: float


class Kernels(Protocol):
    """Operations that a model's layers are made of. Shapes: tokens of all sequences are concatenated.

    Cut where backends can fuse: what stands before or behind a product of matrices belongs to it. A stream
    that was passed in is used up.
    """

    device: torch.device

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: Tensor, norms: HeadNorms | None, cos_sin: Tensor
    ) -> Tensor:
        """Norm and rotate heads, store keys and values, attend causally.

        `qkv [tokens, heads + 2 kv_heads, dim]`; `cos_sin [positions, dim]` fp32 holds cosines, then sines.
        Returns `[tokens, heads * dim]`.
        """
        ...

    def norm_linear(
        self,
        stream: Stream,
        norm: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Stream]:
        """The stream's RMS norm times `weight [out, in]` transposed, into `out` if that is given."""
        ...

    def add_linear(self, stream: Stream, x: Tensor, weight: Weight, bias: Tensor | None) -> Stream:
        """The stream plus `x [tokens, in]` times `weight [out, in]` transposed."""
        ...

    def add_mlp(self, stream: Stream, norm: Tensor, eps: float, gate_up: Weight, down: Weight) -> Stream:
        """The stream plus `down [in, inner]` of silu(first half) times second half of `gate_up [2 inner, in]`
        of the stream's norm.
        """
        ...
