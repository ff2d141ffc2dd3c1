"""What a layer does row by row: norms, rotation of heads, KV stores, activation, a step's inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from prism.attention.gpu.launch import launch, overlap
from prism.attention.kernels import HeadNorms, Stream


@triton.jit
def normed_row(
    x, residual, weight, row, columns, mask, eps, WIDTH: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """norm(x [+ residual]) * weight of one row; the sum replaces the residual."""
    value = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(residual + row * WIDTH + columns, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / WIDTH + eps)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    return value * scale * factor


@triton.jit
def _norm_kernel(
    x, residual, weight, out, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    mask = columns < WIDTH
    value = normed_row(x, residual, weight, row, columns, mask, eps, WIDTH, HAS_RESIDUAL)
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=mask)


def rms_norm(stream: Stream, weight: Tensor, eps: float) -> Tensor:
    """Norm of a stream `[rows, width]`, contiguous; its residual then has what was still to be added."""
    residual, delta = stream.residual, stream.delta
    rows, width = residual.shape
    out = torch.empty_like(residual)
    padded = triton.next_power_of_2(width)
    launch(
        _norm_kernel,
        (rows, 1, 1),
        residual if delta is None else delta,
        residual,
        weight,
        out,
        eps,
        WIDTH=width,
        PADDED=padded,
        HAS_RESIDUAL=delta is not None,
        num_warps=min(16, max(1, padded // 512)),
        **overlap(rows),
    )
    return out


@triton.jit
def silu_mul_row(gate_up, row, columns, mask, WIDTH: tl.constexpr):
    """silu(first half) times second half of a part of one row."""
    gate = tl.load(gate_up + row * (2 * WIDTH) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def _silu_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = silu_mul_row(gate_up, row, columns, mask, WIDTH)
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(first half) times second half of `[rows, 2 width]`, contiguous."""
    rows, double = gate_up.shape
    out = torch.empty(rows, double // 2, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(double // 2, 2048), 1)
    launch(_silu_kernel, grid, gate_up, out, WIDTH=double // 2, BLOCK=2048, num_warps=8, **overlap(rows))
    return out


@triton.jit
def _store_kernel(
    qkv, pages, tables, slots, positions, angles, q_norm, k_norm, eps,
    table_stride, page_stride, value_offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr,
    HAS_NORM: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: queries and keys rotate in place, keys and values are copied to the page."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    position = tl.load(positions + token)
    half = tl.arange(0, DIM // 2)[None, :]
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + heads[:, None]) * DIM + half
    real = (heads < HEADS + 2 * KV_HEADS)[:, None]
    first = tl.load(source, mask=real, other=0.0).to(tl.float32)
    second = tl.load(source + DIM // 2, mask=real, other=0.0).to(tl.float32)
    rotates = (heads < HEADS + KV_HEADS)[:, None]
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM + eps)[:, None]
        is_key = (heads >= HEADS)[:, None]
        low = tl.where(is_key, tl.load(k_norm + half).to(tl.float32), tl.load(q_norm + half).to(tl.float32))
        high = tl.where(
            is_key,
            tl.load(k_norm + DIM // 2 + half).to(tl.float32),
            tl.load(q_norm + DIM // 2 + half).to(tl.float32),
        )
        first = tl.where(rotates, first * scale * low, first)
        second = tl.where(rotates, second * scale * high, second)
    row = tl.maximum(position, 0).to(tl.int64) * DIM
    cos = tl.where(rotates, tl.load(angles + row + half), 1.0)
    sin = tl.where(rotates, tl.load(angles + row + DIM // 2 + half), 0.0)
    kind = qkv.dtype.element_ty
    left, right = (first * cos - second * sin).to(kind), (second * cos + first * sin).to(kind)
    tl.store(source, left, mask=rotates)
    tl.store(source + DIM // 2, right, mask=rotates)
    if position >= 0:
        slot = tl.load(slots + token).to(tl.int64)
        page = tl.load(tables + slot * table_stride + position // TOKENS).to(tl.int64)
        is_value = heads >= HEADS + KV_HEADS
        number = tl.where(is_value, heads - HEADS - KV_HEADS, heads - HEADS)
        place = page * page_stride + (position % TOKENS) * (KV_HEADS * DIM)
        place += number * DIM + tl.where(is_value, value_offset, 0)
        target = pages + place[:, None] + half
        kept = real & (heads >= HEADS)[:, None]
        tl.store(target, left, mask=kept)
        tl.store(target + DIM // 2, right, mask=kept)


STORE_GROUP = 16
"""Heads of one program."""


def rotate_and_store(
    qkv: Tensor,
    pages: Tensor,
    tables: Tensor,
    slots: Tensor,
    positions: Tensor,
    angles: Tensor,
    num_heads: int,
    norms: HeadNorms | None,
) -> Tensor:
    """Rotate a step's queries and keys in place, store its keys and values; returns the queries
    `[tokens, heads, dim]`, a view of `qkv`.

    `qkv [tokens, heads + 2 kv_heads, dim]`, contiguous; `pages [unit, 2, token, kv_head, dim]` one layer's
    view; `slots`, `positions` `[tokens]` int32, position -1 for padding.
    """
    tokens, all_heads, dim = qkv.shape
    kv_heads = pages.shape[3]
    launch(
        _store_kernel,
        (tokens, triton.cdiv(all_heads, STORE_GROUP), 1),
        qkv,
        pages,
        tables,
        slots,
        positions,
        angles,
        None if norms is None else norms.query,
        None if norms is None else norms.key,
        0.0 if norms is None else norms.eps,
        tables.stride(0),
        pages.stride(0),
        pages.stride(1),
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        TOKENS=pages.shape[2],
        HAS_NORM=norms is not None,
        GROUP=STORE_GROUP,
        num_warps=4,
        **overlap(tokens),
    )
    return qkv[:, :num_heads]


@triton.jit(do_not_specialize=["ROWS"])
def _inputs_kernel(
    step, tables, last_tokens, embed, out, positions, slots, table_stride, ROWS,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of a decode step: note its newest block, look up its newest token's embedding."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(step + row)
    position = tl.load(step + ROWS + row)
    if part == 0:
        tl.store(positions + row, position)
        tl.store(slots + row, tl.maximum(slot, 0))
        if position >= 0:
            block = tl.load(step + 2 * ROWS + row)
            tl.store(tables + slot.to(tl.int64) * table_stride + position // TOKENS, block)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    token = tl.load(last_tokens + tl.maximum(slot, 0)).to(tl.int64)
    token = tl.where(position >= 0, token, 0)
    value = tl.load(embed + token * WIDTH + columns, mask=mask)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, value, mask=mask)


def decode_inputs(
    step: Tensor, tables: Tensor, last_tokens: Tensor, embed: Tensor, tokens_per_block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings `[rows, hidden]`, slots and positions `[rows]` of a decode step.

    `step [3, rows]` int32 holds slots, positions (-1: padding) and the block of each position; the newest
    token of a slot is in `last_tokens [slots]` int32.
    """
    rows, width = step.shape[1], embed.shape[1]
    out = torch.empty(rows, width, dtype=embed.dtype, device=embed.device)
    positions = torch.empty(rows, dtype=torch.int32, device=embed.device)
    slots = torch.empty_like(positions)
    launch(
        _inputs_kernel,
        (rows, triton.cdiv(width, 1024), 1),
        step,
        tables,
        last_tokens,
        embed,
        out,
        positions,
        slots,
        tables.stride(0),
        rows,
        WIDTH=width,
        TOKENS=tokens_per_block,
        BLOCK=1024,
        num_warps=4,
        **overlap(rows),
    )
    return out, slots, positions
