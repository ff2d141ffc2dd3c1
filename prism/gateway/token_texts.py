"""What single tokens are, as bytes and as text, for log-probabilities.

A token need not be whole characters. Its bytes are read from the vocabulary: GPT-2's alphabet of bytes
(ByteLevel), `<0xE2>` (ByteFallback), or plain text in which U+2581 stands for a space.
"""

from __future__ import annotations

import json
import re
from functools import cache

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for what follows U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in (decoder, *decoder.get("decoders", ()))}


class TokenTexts:
    """Bytes and text of the tokens of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kinds = _decoder_kinds(tokenizer)
        self._is_byte_level = "ByteLevel" in self._kinds
        self._has_byte_tokens = "ByteFallback" in self._kinds
        self._added = set(tokenizer.get_added_tokens_decoder())
        self._known: dict[int, bytes] = {}

    @property
    def are_all(self) -> bool:
        """The text of tokens is their bytes, one after the other, and nothing else.

        Not if an added token is written in the alphabet of bytes: decoders take that for bytes.
        """
        alphabet = _byte_of_character()
        added = "".join(text.content for text in self._tokenizer.get_added_tokens_decoder().values())
        is_plain = all(character.isascii() for character in added if character in alphabet)
        return self._kinds == {"ByteLevel"} and is_plain

    def byte_tokens(self) -> frozenset[int]:
        """Tokens of which each is one byte, if the vocabulary falls back to such."""
        if not self._has_byte_tokens:
            return frozenset()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        return frozenset(token for text, token in vocabulary.items() if _BYTE_TOKEN.fullmatch(text))

    def data(self, token: int) -> bytes:
        """The token's bytes; none for an id that the vocabulary only pads."""
        if (known := self._known.get(token)) is None:
            known = self._known[token] = self._find_bytes(token)
        return known

    def _find_bytes(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if token in self._added:
            return text.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        if self._is_byte_level:
            alphabet = _byte_of_character()
            is_bytes = all(character in alphabet for character in text)
            return bytes(alphabet[character] for character in text) if is_bytes else text.encode()
        return text.replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """The token as text; `bytes:\\xe2` where it is a part of a character, as OpenAI writes it."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
