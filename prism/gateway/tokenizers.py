"""Each model's tokenizer and shape, read once, in threads, when the gateway starts.

A directory that cannot be read makes its own model unavailable, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prism.config import Config, ModelConfig
from prism.errors import CheckpointError, ModelNotFound, PrismError, Unavailable
from prism.gateway.detokenizer import Detokenizer
from prism.gateway.token_texts import TokenTexts
from prism.modelspec import ModelSpec, read_spec
from prism.types import ModelId

log = logging.getLogger(__name__)


class TextModel:
    """What the gateway knows of one model: its configuration, its shape and its tokenizer."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, tokenizer: Any) -> None:
        self.config = config
        self.name = ModelId(config.name)
        self.spec = spec
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.token_texts = TokenTexts(self._backend)
        self._byte_tokens = self.token_texts.byte_tokens()
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, text in added.items() if text.special)
        self._longest_token = max(map(len, self._backend.get_vocab()), default=1)

    def is_surely_too_long(self, text: str) -> bool:
        """Not even the longest tokens could make it fit; spares tokenising a flood."""
        return len(text) > self.spec.max_position * self._longest_token

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text; takes long for a long one, and releases the interpreter meanwhile."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one choice."""
        return Detokenizer(self.decode, self.token_texts.data, self._special, self._byte_tokens)


def load_text_model(config: ModelConfig) -> TextModel:
    """Read a model directory; raises `CheckpointError`. No code of the directory is run."""
    path = Path(config.path)
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError("no such file", file=str(path / "tokenizer.json"))
    transformers_logging.set_verbosity_error()
    spec = read_spec(path, dtype=config.dtype, max_len=config.max_model_len)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
        return TextModel(config, spec, tokenizer)
    except Exception as error:  # whatever a broken file makes the libraries raise
        raise CheckpointError(f"no usable tokenizer: {error}", file=str(path)) from error


class TextModels:
    """All configured models; each is there once it has been read."""

    def __init__(self, config: Config, executor: Executor) -> None:
        self.names = tuple(ModelId(model.name) for model in config.models)
        self._loads = {
            ModelId(model.name): asyncio.get_running_loop().run_in_executor(executor, load_text_model, model)
            for model in config.models
        }
        for name, load in self._loads.items():
            load.add_done_callback(partial(_report, name))

    async def get(self, name: str, timeout: float) -> TextModel:
        """A model's text side; raises the `RequestError` that says why there is none."""
        load = self._loads.get(ModelId(name))
        if load is None:
            raise ModelNotFound(f"The model {name!r} does not exist", param="model")
        try:
            return await asyncio.wait_for(asyncio.shield(load), timeout)
        except TimeoutError:
            raise Unavailable(f"model {name!r} is still being read", param="model", retry_after=5) from None
        except PrismError as error:
            text = f"model {name!r} cannot be used: {error}"
            raise Unavailable(text, param="model", retry_after=60) from error

    def failure(self, name: ModelId) -> str | None:
        """Why a model cannot be used, as far as is known."""
        load = self._loads[name]
        if not load.done() or load.cancelled() or (error := load.exception()) is None:
            return None
        return str(error)


def _report(name: ModelId, load: asyncio.Future[TextModel]) -> None:
    if not load.cancelled() and (error := load.exception()) is not None:
        log.error("model unavailable: %s", error, extra={"model": name})
