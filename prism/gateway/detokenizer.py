"""Text of tokens as they come: never a torn character, never a part of a stop string.

`Detokenizer` and `ByteDetokenizer` turn tokens into text such that all pieces together are what the tokenizer
makes of all tokens together. Only of a character that the end has cut off nothing is shown, as vLLM does it:
a replacement character would be text that the model has not written. `StopFilter` keeps back what may be the
beginning of a stop string.

    tokens   [ ........ | window ..................... ]
    text                [ emitted ........ | kept back ]

Only the window is decoded again with each token. It is cut to its last tokens whenever nothing is kept
back because of a run of byte tokens; what a cut-off beginning changes is text that has been emitted.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import NamedTuple

REPLACEMENT = "\ufffd"
_LONGEST_WINDOW = 24
_SHORTEST_WINDOW = 8  # more than the 4 bytes that one character may take


class Detokenizer:
    """The text of one choice.

    `decode` is the tokenizer's own, `data` are a token's bytes. `ignored` are tokens without text (special
    ones), `byte_tokens` those of a byte-fallback vocabulary: a run of these is decoded as a whole, so it is
    kept back until it is over.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        data: Callable[[int], bytes],
        ignored: frozenset[int] = frozenset(),
        byte_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._decode = decode
        self._data = data
        self._ignored = ignored
        self._byte_tokens = byte_tokens
        self._window: list[int] = []
        self._num_emitted = 0

    def push(self, token: int) -> str:
        """The text that is certain with this token; empty while a character is incomplete."""
        if token in self._ignored:
            return ""
        self._window.append(token)
        if token in self._byte_tokens:
            return ""
        text = self._decode(self._window)
        certain = len(text) - text.endswith(REPLACEMENT)  # only the last character can be incomplete
        piece = text[self._num_emitted : certain]
        self._num_emitted = max(self._num_emitted, certain)
        if len(self._window) > _LONGEST_WINDOW:
            self._cut(len(text) - self._num_emitted)
        return piece

    def _cut(self, num_kept: int) -> None:
        self._window = self._window[-_SHORTEST_WINDOW:]
        self._num_emitted = len(self._decode(self._window)) - num_kept

    def finish(self) -> str:
        """What was kept back and is whole: nothing will complete the rest."""
        window, num_torn = self._window, _num_torn(b"".join(map(self._data, self._window)))
        is_in_bytes = num_torn > 0 and window[-1] in self._byte_tokens  # each is one
        text = self._decode(window[:-num_torn] if is_in_bytes else window)
        if num_torn and not is_in_bytes:
            text = text.removesuffix(REPLACEMENT)
        return text[self._num_emitted :]


class ByteDetokenizer:
    """The same where a text is the bytes of its tokens and nothing else: none is decoded anew."""

    def __init__(self, data: Callable[[int], bytes], ignored: frozenset[int] = frozenset()) -> None:
        self._data = data
        self._ignored = ignored
        self._decoder = _new_decoder()

    def push(self, token: int) -> str:
        """See `Detokenizer.push`."""
        return "" if token in self._ignored else self._decoder.decode(self._data(token))

    def finish(self) -> str:
        """See `Detokenizer.finish`."""
        kept = self._decoder.getstate()[0]
        return "" if _is_beginning(kept) else kept.decode(errors="replace")


def _num_torn(data: bytes) -> int:
    """Bytes at the end that begin a character and do not complete it."""
    decoder = _new_decoder()
    decoder.decode(data)
    kept = decoder.getstate()[0]
    return len(kept) if _is_beginning(kept) else 0


def _new_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _is_beginning(data: bytes) -> bool:
    """Some character begins so. Python's decoder also keeps back halves of surrogates, which are none."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


class Released(NamedTuple):
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopFilter:
    """Cuts text before the stop string that is complete first; of two that end together, the longer."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._kept = ""

    def push(self, piece: str) -> Released:
        """More text."""
        if not self._stops:
            return Released(piece, False)
        text = self._kept + piece
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self._kept = ""
            return Released(text[: min(matches)[1]], True)
        num_kept = max(_overlap(text, stop) for stop in self._stops)
        self._kept = text[len(text) - num_kept :]
        return Released(text[: len(text) - num_kept], False)

    def finish(self) -> str:
        """The text has ended without a stop string."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
