"""What a device must be laid out for before any of its models is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from prism.config import ModelConfig
from prism.errors import PrismError
from prism.modelspec import read_spec


class ModelNeeds(NamedTuple):
    """The greatest of all models."""

    max_context: int
    max_vocab: int


LEAST = ModelNeeds(max_context=16_384, max_vocab=131_072)
"""Also where no checkpoint can be read yet."""


def needs_of(models: Sequence[ModelConfig]) -> ModelNeeds:
    """Of all models whose checkpoints can be read; the others fail when they are loaded, or fit the least."""
    context, vocab = LEAST
    for model in models:
        with suppress(PrismError):
            spec = read_spec(model.path, dtype=model.dtype, max_len=model.max_model_len)
            context, vocab = max(context, spec.max_position), max(vocab, spec.vocab_size)
    return ModelNeeds(context, vocab)
