"""Each model's tokenizer and shape, read once, in threads, after the gateway has started.

A directory that cannot be read makes its own model unavailable, and nothing else. Reading takes up to a
second, most of it in Python: models whose files are the same, as fine-tunes often have them, share what was
read, and whom somebody asks for is read first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from prism.config import Config, ModelConfig
from prism.errors import CheckpointError, ModelNotFound, PrismError, Unavailable
from prism.gateway.detokenizer import ByteDetokenizer, Detokenizer
from prism.gateway.token_texts import TokenTexts
from prism.modelspec import ModelSpec, read_spec
from prism.types import ModelId

log = logging.getLogger(__name__)

NUM_READERS = 2
"""Threads of their own, so that no prompt of a model that is there waits for a directory."""
READ_FROM = ("config.json", "*token*", "vocab*", "merges*", "chat_template*", "additional_chat_templates/*")
"""Files of a directory that its tokenizer may depend on."""


class Vocabulary:
    """A tokenizer, and what follows from it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.token_texts = TokenTexts(self._backend)
        self._are_bytes_all = self.token_texts.are_all
        self._byte_tokens = self.token_texts.byte_tokens()
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, text in added.items() if text.special)
        self.longest_token = max(map(len, self._backend.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of a text; takes long for a long one, and releases the interpreter meanwhile."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=True)
        return text

    def detokenizer(self) -> Detokenizer | ByteDetokenizer:
        """A fresh one for one choice."""
        if self._are_bytes_all:
            return ByteDetokenizer(self.token_texts.data, self._special)
        return Detokenizer(self.decode, self.token_texts.data, self._special, self._byte_tokens)


class _Shared:
    """A vocabulary that is being read, or has been."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.vocabulary: Vocabulary | None = None


class Vocabularies:
    """Those that were read; directories with the same files share one. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_digest: dict[bytes, _Shared] = {}

    def read(self, directory: Path) -> Vocabulary:
        """A directory's; raises `CheckpointError`. No code of the directory is run."""
        if not (directory / "tokenizer.json").is_file():
            raise CheckpointError("no such file", file=str(directory / "tokenizer.json"))
        transformers_logging.set_verbosity_error()
        try:
            digest = _digest(directory)
            with self._lock:
                shared = self._by_digest.setdefault(digest, _Shared())
            with shared.lock:
                if shared.vocabulary is None:
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
                    shared.vocabulary = Vocabulary(tokenizer)
                return shared.vocabulary
        except Exception as error:  # whatever a broken file makes the libraries raise
            raise CheckpointError(f"no usable tokenizer: {error}", file=str(directory)) from error


def _digest(directory: Path) -> bytes:
    digest = blake2b()
    files = {file for pattern in READ_FROM for file in directory.glob(pattern) if file.is_file()}
    for file in sorted(files):
        data = file.read_bytes()
        digest.update(f"{file.relative_to(directory)} {len(data)}\n".encode())
        digest.update(data)
    return digest.digest()


class TextModel:
    """What the gateway knows of one model: its configuration, its shape and its tokenizer."""

    def __init__(self, config: ModelConfig, spec: ModelSpec, vocabulary: Vocabulary) -> None:
        self.config = config
        self.name = ModelId(config.name)
        self.spec = spec
        self.vocabulary = vocabulary

    def is_surely_too_long(self, text: str) -> bool:
        """Not even the longest tokens could make it fit; spares tokenising a flood."""
        return len(text) > self.spec.max_position * self.vocabulary.longest_token


def load_text_model(config: ModelConfig, vocabularies: Vocabularies) -> TextModel:
    """Read a model directory; raises `CheckpointError`."""
    path = Path(config.path)
    vocabulary = vocabularies.read(path)
    return TextModel(config, read_spec(path, dtype=config.dtype, max_len=config.max_model_len), vocabulary)


class TextModels:
    """All configured models; each is there once it has been read. On the event loop."""

    def __init__(self, config: Config) -> None:
        self.names = tuple(ModelId(model.name) for model in config.models)
        self._threads = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="read")
        self._vocabularies = Vocabularies()
        self._unread = {ModelId(model.name): model for model in config.models}
        self._asked: dict[ModelId, None] = {}
        """Of the unread ones those that somebody asks for, in that order."""
        loop = asyncio.get_running_loop()
        self._loads: dict[ModelId, asyncio.Future[TextModel]] = {
            name: loop.create_future() for name in self.names
        }
        self._readers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to read."""
        self._readers = [asyncio.create_task(self._read()) for _ in range(NUM_READERS)]

    def close(self) -> None:
        """Read no more."""
        for task in self._readers:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unread:
            name = next(iter(self._asked or self._unread))
            self._asked.pop(name, None)
            config = self._unread.pop(name)
            load = self._loads[name]
            try:
                load.set_result(
                    await loop.run_in_executor(self._threads, load_text_model, config, self._vocabularies)
                )
            except Exception as error:
                log.error("model unavailable: %s", error, extra={"model": name})
                load.set_exception(error)
                load.exception()  # seen, whether anybody asks for the model or not

    async def get(self, name: str, timeout: float) -> TextModel:
        """A model's text side; raises the `RequestError` that says why there is none."""
        load = self._loads.get(ModelId(name))
        if load is None:
            raise ModelNotFound(f"The model {name!r} does not exist", param="model")
        if name in self._unread:
            self._asked[ModelId(name)] = None
        try:
            return await asyncio.wait_for(asyncio.shield(load), timeout)
        except TimeoutError:
            raise Unavailable(f"model {name!r} is still being read", param="model", retry_after=5) from None
        except PrismError as error:
            text = f"model {name!r} cannot be used: {error}"
            raise Unavailable(text, param="model", retry_after=60) from error

    def max_len(self, name: ModelId) -> int | None:
        """Tokens of a model's longest context, whatever the memory; None if it was not read, or cannot be."""
        load = self._loads[name]
        return load.result().spec.max_position if _has_ended(load) and load.exception() is None else None

    def failure(self, name: ModelId) -> str | None:
        """Why a model cannot be used, as far as is known."""
        load = self._loads[name]
        error = load.exception() if _has_ended(load) else None
        return None if error is None else str(error)


def _has_ended(load: asyncio.Future[TextModel]) -> bool:
    return load.done() and not load.cancelled()
