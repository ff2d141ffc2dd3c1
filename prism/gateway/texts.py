"""The text side of one choice: tokens in, text and log-probabilities out."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from prism.gateway.detokenizer import Released, StopFilter
from prism.gateway.requests import Accepted
from prism.gateway.tokenizers import TextModel
from prism.messages import TokenLogprob
from prism.types import FinishReason


class TokenEntry(NamedTuple):
    """A token with its log-probability and the place in the choice's text where it begins."""

    token: int
    logprob: TokenLogprob
    offset: int


class Piece(NamedTuple):
    """What may be shown of a choice since the piece before. The pieces of a choice make up its answer."""

    choice: int
    text: str
    entries: tuple[TokenEntry, ...]
    finish: FinishReason | None


class ChoiceText:
    """Text of one choice. Log-probabilities are shown with the text they belong to, never behind a stop."""

    def __init__(self, model: TextModel, choice: int, stops: tuple[str, ...], min_tokens: int) -> None:
        self.choice = choice
        self._min_tokens = min_tokens
        self.num_tokens = 0
        """Tokens that count for usage."""
        self._detokenizer = model.vocabulary.detokenizer()
        self._filter = StopFilter(stops)
        self._num_decoded = 0
        self._num_shown = 0
        self._entries: deque[TokenEntry] = deque()

    def push_token(self, token: int) -> Piece | None:
        """See `push`, for one token without log-probabilities."""
        self.num_tokens += 1
        text, is_cut = self._released(self._detokenizer.push(token))
        if is_cut:
            return self._piece(text, FinishReason.STOP, is_cut=True)
        return self._piece(text, None) if text else None

    def push(self, accepted: Accepted) -> Piece | None:
        """What the tokens add; None while all of it is kept back."""
        text = ""
        for index, token in enumerate(accepted.token_ids):
            self.num_tokens += 1
            if accepted.logprobs is not None:
                self._entries.append(TokenEntry(token, accepted.logprobs[index], self._num_decoded))
            released = self._released(self._detokenizer.push(token))
            text += released.text
            if released.stopped:
                return self._piece(text, FinishReason.STOP, is_cut=True)
        if accepted.finish is None:
            return self._piece(text, None) if text else None
        self.num_tokens += accepted.stop_token is not None
        released = self._released(self._detokenizer.finish())
        text += released.text
        if released.stopped:
            return self._piece(text, FinishReason.STOP, is_cut=True)
        return self._piece(text + self._filter.finish(), accepted.finish)

    def _released(self, piece: str) -> Released:
        """Stop strings are looked for behind the first `min_tokens` tokens, as vLLM does."""
        self._num_decoded += len(piece)
        return self._filter.push(piece) if self.num_tokens > self._min_tokens else Released(piece, False)

    def _piece(self, text: str, finish: FinishReason | None, is_cut: bool = False) -> Piece:
        self._num_shown += len(text)
        shown = []
        is_all = finish is not None and not is_cut
        while self._entries and (is_all or self._entries[0].offset < self._num_shown):
            shown.append(self._entries.popleft())
        return Piece(self.choice, text, tuple(shown), finish)
