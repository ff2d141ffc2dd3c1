"""What bias, penalties and forbidden ends do to one sequence's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from prism.engine.sequence import Sequence


class Adjustment:
    """Of one sequence; bias and the tokens seen stay where the logits are, from one draw to the next."""

    def __init__(self, row: Sequence, device: torch.device) -> None:
        bias = row.params.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(bias.values()), device=device)
        self._seen: set[int] = set()
        self._seen_there = torch.empty(0, dtype=torch.int64, device=device)
        """The same tokens."""
        self._num_looked = 0
        """At so many tokens of the sequence."""

    def apply(self, logits: Tensor, row: Sequence) -> None:
        """In place, to `logits [vocabulary]` of the sequence's next token."""
        params = row.params
        if params.logit_bias:
            logits[self._biased] += self._bias
        if params.repetition_penalty != 1.0:
            self._look(row.tokens)
            seen = logits[self._seen_there]
            scale = params.repetition_penalty
            logits[self._seen_there] = torch.where(seen > 0, seen / scale, seen * scale)
        if (params.frequency_penalty or params.presence_penalty) and row.counts:
            tokens = torch.tensor(list(row.counts), device=logits.device)
            counts = torch.tensor(list(row.counts.values()), dtype=torch.float32, device=logits.device)
            logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty
        if row.draw_index < params.min_tokens and params.stop_token_ids:
            logits[list(params.stop_token_ids)] = -torch.inf

    def _look(self, tokens: list[int]) -> None:
        new = set(tokens[self._num_looked :]) - self._seen
        self._num_looked = len(tokens)
        if new:
            self._seen |= new
            there = torch.tensor(list(new), device=self._seen_there.device)
            self._seen_there = torch.cat([self._seen_there, there])
