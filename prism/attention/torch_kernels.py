"""`Kernels` in plain torch operations: the backend of CPUs.

Decoding sequences are attended together over padded tables; prompt chunks one by one. Garbage in blocks never
reaches a result: fresh blocks are zeroed, and padding repeats a sequence's own first block under the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prism.attention.cpu_linear import CpuLinear
from prism.attention.kernels import AttentionPlan, BatchLayout, HeadNorms, KvView, Stream, Weight
from prism.attention.slots import token_slots


@dataclass(frozen=True, slots=True)
class _Decodes:
    """All sequences that compute one token."""

    rows: Tensor  # [batch] places in the concatenated tokens
    tables: Tensor  # [batch, blocks]
    mask: Tensor  # [batch, 1, 1, blocks * tokens_per_block], False where there is no token


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One sequence that computes several tokens."""

    rows: slice
    table: Tensor  # [blocks]
    context_len: int
    mask: Tensor | None  # [query, context]; None where plain causal attention does


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """One batch over one KV view."""

    kv: KvView
    num_heads: int
    positions: Tensor  # [tokens]
    blocks: Tensor  # [tokens] block of each new token
    offsets: Tensor  # [tokens] place in the block
    decodes: _Decodes | None
    prompts: tuple[_Prompt, ...]


class TorchKernels:
    """See the module's docstring."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu_linear = CpuLinear()
        self._rotation: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # positions, table, cos, sin

    def plan(self, batch: BatchLayout, kv: KvView, num_heads: int) -> TorchPlan:
        """Index tensors for one batch. Zeroes the batch's fresh blocks."""
        if batch.new_blocks:
            kv.pages.index_fill_(0, self._index(list(batch.new_blocks)), 0)
        starts = [0]
        for length in batch.query_lens:
            starts.append(starts[-1] + length)
        single = [i for i, length in enumerate(batch.query_lens) if length == 1]
        blocks, offsets = token_slots(batch, kv.tokens_per_block)
        return TorchPlan(
            kv=kv,
            num_heads=num_heads,
            positions=self._index(_positions(batch)),
            blocks=self._index(blocks),
            offsets=self._index(offsets),
            decodes=self._plan_decodes(batch, single, starts, kv) if single else None,
            prompts=tuple(
                self._plan_prompt(batch, i, starts[i], kv)
                for i, length in enumerate(batch.query_lens)
                if length > 1
            ),
        )

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _plan_decodes(self, batch: BatchLayout, single: list[int], starts: list[int], kv: KvView) -> _Decodes:
        width = max(len(batch.tables[i]) for i in single)
        tables = [batch.tables[i] + batch.tables[i][:1] * (width - len(batch.tables[i])) for i in single]
        lens = self._index([batch.context_lens[i] for i in single])
        positions = torch.arange(width * kv.tokens_per_block, device=self.device)
        mask = positions[None, :] < lens[:, None]
        return _Decodes(
            rows=self._index([starts[i] for i in single]),
            tables=self._index(tables),
            mask=mask[:, None, None, :],
        )

    def _plan_prompt(self, batch: BatchLayout, i: int, start: int, kv: KvView) -> _Prompt:
        query, context = batch.query_lens[i], batch.context_lens[i]
        mask = None
        if query != context:
            positions = torch.arange(context, device=self.device)
            mask = positions[None, :] <= positions[context - query :, None]
        num_blocks = -(-context // kv.tokens_per_block)
        table = self._index(batch.tables[i][:num_blocks])
        return _Prompt(slice(start, start + query), table, context, mask)

    def attention(
        self, plan: AttentionPlan, layer: int, qkv: Tensor, norms: HeadNorms | None, cos_sin: Tensor
    ) -> Tensor:
        """See `Kernels.attention`."""
        assert isinstance(plan, TorchPlan)
        pages = plan.kv.pages[:, layer]  # [unit, 2, token, kv_head, dim]
        heads, kv_heads = plan.num_heads, pages.shape[3]
        v = qkv[:, heads + kv_heads :]
        rotated = self._rope(_norm_heads(qkv[:, : heads + kv_heads], heads, norms), plan.positions, cos_sin)
        q, k = rotated[:, :heads], rotated[:, heads:]
        pages[plan.blocks, 0, plan.offsets] = k
        pages[plan.blocks, 1, plan.offsets] = v
        return self._attend(plan, pages, q).flatten(1)

    def _attend(self, plan: TorchPlan, pages: Tensor, q: Tensor) -> Tensor:
        if plan.decodes is not None and not plan.prompts:
            return _attend_decodes(plan.decodes, pages, q)
        out = torch.empty_like(q)
        if plan.decodes is not None:
            out[plan.decodes.rows] = _attend_decodes(plan.decodes, pages, q[plan.decodes.rows])
        for prompt in plan.prompts:
            out[prompt.rows] = _attend_prompt(plan, prompt, pages, q)
        return out

    def norm_linear(
        self,
        stream: Stream,
        norm: Tensor,
        eps: float,
        weight: Weight,
        bias: Tensor | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Stream]:
        """See `Kernels.norm_linear`."""
        x, stream = _norm_stream(stream, norm, eps)
        result = self._linear(x, weight, bias)
        return (result if out is None else out.copy_(result)), stream

    def add_linear(self, stream: Stream, x: Tensor, weight: Weight, bias: Tensor | None) -> Stream:
        """See `Kernels.add_linear`."""
        return Stream(stream.residual, self._linear(x, weight, bias))

    def add_mlp(self, stream: Stream, norm: Tensor, eps: float, gate_up: Weight, down: Weight) -> Stream:
        """See `Kernels.add_mlp`."""
        x, stream = _norm_stream(stream, norm, eps)
        gate, up = self._linear(x, gate_up).chunk(2, dim=-1)
        return Stream(stream.residual, self._linear(F.silu(gate).mul_(up), down))

    def _linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        return self.cpu_linear(x, weight.plain(x.dtype), bias)

    def _rope(self, heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """Rotation of the two halves of each head, in fp32."""
        cos, sin = self._angles(positions, cos_sin)
        first, second = heads.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(heads.dtype)

    def _angles(self, positions: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[tokens, 1, dim / 2]`: looked up once for all layers of a step."""
        known = self._rotation
        if known is None or known[0] is not positions or known[1] is not cos_sin:
            cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
            known = self._rotation = (positions, cos_sin, cos, sin)
        return known[2], known[3]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In fp32, rounded before the weight is applied, as the reference models do."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def _norm_stream(stream: Stream, norm: Tensor, eps: float) -> tuple[Tensor, Stream]:
    residual = stream.residual if stream.delta is None else stream.residual + stream.delta
    return rms_norm(residual, norm, eps), Stream(residual)


def _norm_heads(qk: Tensor, num_heads: int, norms: HeadNorms | None) -> Tensor:
    if norms is None:
        return qk
    q = rms_norm(qk[:, :num_heads], norms.query, norms.eps)
    k = rms_norm(qk[:, num_heads:], norms.key, norms.eps)
    return torch.cat((q, k), dim=1)


def _positions(batch: BatchLayout) -> list[int]:
    lens = zip(batch.query_lens, batch.context_lens, strict=True)
    return [position for query, context in lens for position in range(context - query, context)]


def _attend_decodes(decodes: _Decodes, pages: Tensor, q: Tensor) -> Tensor:
    num, width = decodes.tables.shape
    tokens = width * pages.shape[2]
    k, v = (
        pages[:, which][decodes.tables].view(num, tokens, *pages.shape[3:]).transpose(1, 2)
        for which in (0, 1)
    )
    # Query heads that share a KV head stand as so many queries of it: 6 x faster than enable_gqa on a CPU.
    rows = q.reshape(num, k.shape[1], -1, q.shape[-1])  # [batch, kv_heads, group, dim]
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=decodes.mask)
    return out.flatten(1, 2)


def _attend_prompt(plan: TorchPlan, prompt: _Prompt, pages: Tensor, q: Tensor) -> Tensor:
    gathered = pages[prompt.table]  # [blocks, 2, token, kv_head, dim]
    k = gathered[:, 0].reshape(-1, *pages.shape[3:])[: prompt.context_len].transpose(0, 1)
    v = gathered[:, 1].reshape(-1, *pages.shape[3:])[: prompt.context_len].transpose(0, 1)
    out = F.scaled_dot_product_attention(
        q[prompt.rows].transpose(0, 1).unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=prompt.mask,
        is_causal=prompt.mask is None,
        enable_gqa=plan.num_heads != pages.shape[3],
    )
    return out.squeeze(0).transpose(0, 1)
