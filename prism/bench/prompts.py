"""Prompts of exactly so many tokens, all different: token ids, or text for one tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from prism.errors import ConfigError

MAX_CANDIDATES = 512
"""Tokens that texts are made of."""
MAX_TRIES = 64


class PromptMaker(Protocol):
    """Makes prompts of one kind."""

    def make(self, length: int, random: np.random.Generator) -> str | list[int]:
        """One that counts so many tokens."""
        ...


class TokenIds:
    """Random ids from a range that every vocabulary has."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def make(self, length: int, random: np.random.Generator) -> list[int]:
        """See `PromptMaker.make`."""
        ids: list[int] = random.integers(self._low, self._high, length).tolist()
        return ids


class Texts:
    """Texts of tokens that stay apart when they are written one behind the other."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._added = len(tokenizer.encode("").ids)
        """Tokens that the tokenizer puts around every text, which count as prompt."""
        self._candidates = _candidates(tokenizer)
        if not self._candidates:
            raise ConfigError([f"{source}: no token of its vocabulary stays itself in a text"])

    def make(self, length: int, random: np.random.Generator) -> str:
        """See `PromptMaker.make`. What merges with its neighbours is drawn anew."""
        wanted = length - self._added
        if wanted < 1:
            return ""  # shorter than what the tokenizer adds: the shortest that there is
        ids = self._draw(wanted, random)
        for _ in range(MAX_TRIES):
            text: str = self._tokenizer.decode(ids)
            missing = length - len(self._tokenizer.encode(text).ids)
            if missing == 0:
                return text
            ids = ids + self._draw(missing, random) if missing > 0 else ids[:missing]
            ids = ids or self._draw(1, random)
        raise ConfigError([f"{self._source}: no text of exactly {length} tokens was found"])

    def _draw(self, count: int, random: np.random.Generator) -> list[int]:
        return [self._candidates[i] for i in random.integers(0, len(self._candidates), count)]


def _candidates(tokenizer: Any) -> list[int]:
    """Ids whose text, alone or repeated, is read back as the same ids; words with a space before them."""
    special = {int(i) for i, token in tokenizer.get_added_tokens_decoder().items()}
    found: list[int] = []
    others: list[int] = []
    size = tokenizer.get_vocab_size()
    for token in range(0, size, max(1, size // (16 * MAX_CANDIDATES))):
        if token in special:
            continue
        text = tokenizer.decode([token, token, token])
        if tokenizer.encode(text, add_special_tokens=False).ids != [token] * 3:
            continue
        is_word = text[:1] == " " and text.split()[0].isalpha() if text.split() else False
        (found if is_word else others).append(token)
        if len(found) == MAX_CANDIDATES:
            break
    return found or others[:MAX_CANDIDATES]


def load_texts(path: Path) -> Texts:
    """Texts for the tokenizer of a model directory, or of a tokenizer.json. Raises `ConfigError`."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError([f"{file}: no tokenizer: {error}"]) from None
    return Texts(tokenizer, str(file))
