"""Random draws, one program a row: temperature, min_p, top_k and top_p without sorting.

What sorting is for are two thresholds: of the `top_k` likeliest tokens, and of the fewest that reach `top_p`.
Logits are numbers of 16 bits, so either is found exactly by quartering their ordered bit patterns eight
times. A draw then inverts the distribution of what is left, in the order of the tokens, at one uniform number
(`engine/sampler.draw` is the same in torch).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prism.attention.gpu.launch import launch

BLOCK = 4096
LOG2_E = 1.4426950408889634


@triton.jit
def _ordered(x):
    """Bit patterns of 16-bit floats as integers that order as they do."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFF, bits)


@triton.jit
def _weights(row, columns, size, peak, scale, min_p):
    """Probabilities relative to the likeliest token's, and ordered patterns; below `min_p` they are 0."""
    x = tl.load(row + columns, mask=columns < size, other=-float("inf"))
    weights = tl.exp2((x.to(tl.float32) - peak) * scale)
    return tl.where(weights < min_p, 0.0, weights), tl.where(columns < size, _ordered(x), -40000)


@triton.jit
def _from(row, size, least, peak, scale, min_p, BLOCK: tl.constexpr):
    """How many tokens have a pattern of `least` or more, and their weight together."""
    counts = tl.zeros((BLOCK,), tl.int32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        weights, order = _weights(row, start + tl.arange(0, BLOCK), size, peak, scale, min_p)
        counts += (order >= least).to(tl.int32)
        masses += tl.where(order >= least, weights, 0.0)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _last_reached(row, size, low, wanted, peak, scale, min_p, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest pattern, `low` or more, from which on tokens come to `wanted`: in number, or in weight.

    Three patterns a pass leave a quarter of those in question.
    """
    high = tl.full((), 32768, tl.int32)
    while high - low > 1:
        quarter = tl.maximum((high - low) // 4, 1)
        first, second, third = low + quarter, low + 2 * quarter, low + 3 * quarter
        sums1 = tl.zeros((BLOCK,), tl.float32)
        sums2 = tl.zeros((BLOCK,), tl.float32)
        sums3 = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, size, BLOCK):
            weights, order = _weights(row, start + tl.arange(0, BLOCK), size, peak, scale, min_p)
            if COUNTS:  # exact in fp32: a sum has fewer than 2^24
                weights = tl.full((BLOCK,), 1.0, tl.float32)
            sums1 += tl.where(order >= first, weights, 0.0)
            sums2 += tl.where(order >= second, weights, 0.0)
            sums3 += tl.where(order >= third, weights, 0.0)
        if tl.sum(sums3, 0) >= wanted:
            low = third
        elif tl.sum(sums2, 0) >= wanted:
            low = second
            high = tl.minimum(high, third)
        elif tl.sum(sums1, 0) >= wanted:
            low = first
            high = tl.minimum(high, second)
        else:
            high = first
    return low


@triton.jit
def _weight_of(order, like, peak, scale, min_p):
    """Of a token with this pattern; `like` is any logit."""
    bits = tl.where(order < 0, order ^ 0x7FFF, order).to(tl.int16)
    x = bits.to(like.dtype, bitcast=True).to(tl.float32)
    weight = tl.exp2((x - peak) * scale)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit
def _draw_kernel(
    logits, stride, size, places, temperatures, top_ks, top_ps, min_ps, uniforms, slots, out, last_tokens,
    LOG2_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; its last pattern kept is `cut`, of which the first `num_ties` tokens are."""
    index = tl.program_id(0)
    place = tl.load(places + index)
    if place < 0:
        return
    row = logits + place.to(tl.int64) * stride
    scale = LOG2_E / tl.maximum(tl.load(temperatures + index), 1e-5)
    min_p, top_p, top_k = tl.load(min_ps + index), tl.load(top_ps + index), tl.load(top_ks + index)
    like = tl.load(row)

    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in tl.range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(row + columns, mask=columns < size, other=-float("inf"))
        best = tl.maximum(best, x.to(tl.float32))
    peak = tl.max(best, 0)

    cut = tl.full((), -32769, tl.int32)
    if (top_k > 0) & (top_k < size):
        cut = _last_reached(
            row, size, tl.full((), -32768, tl.int32), top_k.to(tl.float32), peak, scale, min_p, True, BLOCK
        )
    above, mass = _from(row, size, cut + 1, peak, scale, min_p, BLOCK)
    num_ties = tl.where(cut >= -32768, top_k - above, 0)
    total = mass + num_ties * _weight_of(cut, like, peak, scale, min_p) if cut >= -32768 else mass
    if top_p < 1.0:
        wanted = top_p * total
        least = tl.maximum(cut, -32768)
        low = _last_reached(row, size, least, wanted, peak, scale, min_p, False, BLOCK)
        _, mass = _from(row, size, low + 1, peak, scale, min_p, BLOCK)
        each = tl.maximum(_weight_of(low, like, peak, scale, min_p), 1e-37)
        ties = tl.maximum(tl.ceil((wanted - mass) / each), 1.0).to(tl.int32)
        num_ties = tl.minimum(ties, num_ties) if low == cut else ties
        cut = low
        total = mass + num_ties * each

    target = (tl.load(uniforms + index) * total).to(tl.float32)
    reached, seen, start = 0.0, 0, 0
    found, last = size, 0
    while (start < size) & (found == size):
        columns = start + tl.arange(0, BLOCK)
        weights, order = _weights(row, columns, size, peak, scale, min_p)
        ties = (order == cut).to(tl.int32)
        is_kept = (order > cut) | ((order == cut) & (seen + tl.cumsum(ties, 0) <= num_ties))
        weights = tl.where(is_kept, weights, 0.0)
        is_past = (weights > 0) & (reached + tl.cumsum(weights, 0) > target)
        found = tl.min(tl.where(is_past, columns, size), 0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, columns, 0), 0))
        reached += tl.sum(weights, 0)
        seen += tl.sum(ties, 0)
        start += BLOCK
    token = tl.where(found < size, found, last)
    tl.store(out + place, token)
    tl.store(last_tokens + tl.load(slots + place), token)


def draw_random(
    logits: Tensor,
    places: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    slots: Tensor,
    out: Tensor,
    last_tokens: Tensor,
) -> None:
    """Tokens of the rows `places [draws]` of `logits [rows, vocabulary]`, bf16 or fp16; none where one is -1.

    `temperature`, `top_p`, `min_p` fp32, `top_k` int32 (0 keeps all), `uniforms` fp64, all `[draws]`. Tokens
    go into `out [rows]` and `last_tokens[slots[row]]`, all of these int32. Nothing waits for the device.
    """
    launch(
        _draw_kernel, (len(places), 1, 1),
        logits, logits.stride(0), logits.shape[1], places, temperature, top_k, top_p, min_p, uniforms,
        slots, out, last_tokens, LOG2_E=LOG2_E, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
