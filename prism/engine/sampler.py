"""Draws the next token of each sequence from its logits.

Order of operations: logit_bias, penalties, min_tokens; then greedy, or temperature, min_p, top_k, top_p.
A draw inverts the cumulative distribution, in the order of the tokens, at one uniform number, so it depends
on nothing but the row's own logits and (seed, choice, position). Reported log-probabilities are of the raw
logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from prism.engine.adjustment import Adjustment
from prism.engine.randomness import uniforms
from prism.engine.sequence import Sequence
from prism.messages import TokenLogprob

DRAW_NUMBERS = 1 << 23
"""Logits that are drawn from at a time: intermediate results take up to 40 bytes for each."""


class Sampled(NamedTuple):
    """What was drawn: a token for each row."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]
    """By row, of those that asked for them."""


NOTHING = Sampled([], {})


def sample(logits: Tensor, rows: Seq[Sequence]) -> Sampled:
    """One token for each row. `logits` is `[rows, vocabulary]` fp32 and may be overwritten."""
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = torch.log_softmax(logits[wanted], dim=-1) if wanted else None
    for index, row in enumerate(rows):
        _adjust(logits[index], row)
    tokens = torch.argmax(logits, dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [rows[i] for i in drawn])
    chosen = tokens.tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        logprobs = _report(raw, wanted, rows, chosen)
    return Sampled(chosen, logprobs)


def _adjust(logits: Tensor, row: Sequence) -> None:
    """Bias, penalties and forbidden ends of one row, in place."""
    if row.needs_history:
        if row.adjustment is None:
            row.adjustment = Adjustment(row, logits.device)
        row.adjustment.apply(logits, row)


def _draw(logits: Tensor, rows: Seq[Sequence]) -> Tensor:
    params = [row.params for row in rows]
    numbers = uniforms([row.random_stream for row in rows], [row.draw_index for row in rows])

    def on_device(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    return draw(
        logits,
        temperature=on_device([p.temperature for p in params]),
        top_k=on_device([p.top_k for p in params], torch.int32),
        top_p=on_device([p.top_p for p in params]),
        min_p=on_device([p.min_p for p in params]),
        uniforms=torch.from_numpy(numbers).to(logits.device),
        are_cut=any(p.top_k or p.top_p < 1.0 for p in params),
    )


def draw(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    are_cut: bool,
) -> Tensor:
    """Tokens `[rows]` by inversion of each row's filtered distribution; nothing waits for the device.

    `logits [rows, vocabulary]`, all else `[rows]`; `top_k` 0 keeps all. Without `are_cut` no row has a top_k
    or top_p. Only so many rows are drawn at a time as `DRAW_NUMBERS` allows.
    """
    size = max(1, DRAW_NUMBERS // logits.shape[-1])
    given = (logits, temperature, top_k, top_p, min_p, uniforms)
    parts = [slice(start, start + size) for start in range(0, len(logits), size)]
    return torch.cat([_draw_group(*(tensor[part] for tensor in given), are_cut=are_cut) for part in parts])


def _draw_group(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    are_cut: bool,
) -> Tensor:
    logits = logits.float()
    probs = torch.softmax(logits / temperature.clamp_min(1e-5)[:, None], dim=-1)
    probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(dim=-1, keepdim=True), 0.0)
    if are_cut:
        highest, order = probs.sort(dim=-1, descending=True, stable=True)
        probs = torch.zeros_like(probs).scatter_(-1, order, _filter_sorted(highest, top_k, top_p))
    cumulative = probs.double().cumsum(dim=-1)
    places = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    numbers = torch.arange(probs.shape[-1], device=probs.device)
    last = (probs > 0).long().mul(numbers).amax(dim=-1, keepdim=True)
    return torch.minimum(places, last).squeeze(-1)


def _filter_sorted(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_k likeliest, then the fewest that reach top_p; `probs` descends."""
    places = torch.arange(probs.shape[-1], device=probs.device)[None]
    probs = probs.masked_fill((top_k[:, None] > 0) & (places >= top_k[:, None]), 0.0)
    cumulative = probs.double().cumsum(dim=-1)
    before = cumulative - probs
    drop = (before >= top_p.double()[:, None] * cumulative[:, -1:]) & (top_p[:, None] < 1.0)
    drop[:, 0] = False
    return probs.masked_fill(drop, 0.0)


def _report(raw: Tensor, wanted: Seq[int], rows: Seq[Sequence], chosen: Seq[int]) -> dict[int, TokenLogprob]:
    """Log-probabilities of the rows that want them."""
    most = max(rows[i].params.logprobs or 0 for i in wanted)
    values, ids = raw.topk(most, dim=-1) if most else (raw[:, :0], raw[:, :0].long())
    picked = raw.gather(-1, torch.tensor([[chosen[i]] for i in wanted], device=raw.device)).squeeze(-1)
    reports = {}
    lists = zip(wanted, picked.tolist(), ids.tolist(), values.tolist(), strict=True)
    for index, logprob, top_ids, top_values in lists:
        count = rows[index].params.logprobs or 0
        pairs = list(zip(top_ids[:count], top_values[:count], strict=True))
        reports[index] = TokenLogprob(logprob, pairs)
    return reports
