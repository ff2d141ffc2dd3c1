"""From the dispatcher to the HTTP response: sinks that feed one mailbox per HTTP request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, assert_never

from prism.gateway.observer import Observer
from prism.gateway.requests import Accepted, Ending, Failed, Finished
from prism.gateway.texts import ChoiceText, Piece
from prism.gateway.tokenizers import TextModel
from prism.messages import Started
from prism.types import FinishReason

MOST_PIECES = 64
"""In one batch: others would wait while all is written at once for a client that has not read for long."""


class Batch(NamedTuple):
    """What has come together: more than a piece if the client reads, or the gateway sends, too slowly."""

    pieces: list[Piece]
    failure: Failed | None
    """Behind the pieces; nothing follows."""


class Mailbox:
    """Pieces in the order in which they came, until all prompts of an HTTP request have ended."""

    def __init__(self, num_requests: int, on_failure: Callable[[], object] = lambda: None) -> None:
        """`on_failure` hears of the first one when it comes: that may be long before it is told."""
        self._num_open = num_requests
        self._on_failure = on_failure
        self._pieces: deque[Piece] = deque()
        self._failure: Failed | None = None
        self._has_left = False
        """Not all that had come was in the last batch."""
        self._is_over = False
        """A failure has been told."""
        self._wake = asyncio.Event()

    def put(self, item: Piece | Failed | Finished) -> None:
        """Called by sinks. What comes behind a failure is not shown."""
        match item:
            case Piece():
                if self._failure is None:
                    self._pieces.append(item)
            case Failed():
                self._num_open -= 1
                if self._failure is None:
                    self._failure = item
                    self._on_failure()
            case Finished():
                self._num_open -= 1
            case never:
                assert_never(never)
        self._wake.set()

    async def next(self) -> Batch | None:
        """What has come since the last one, `MOST_PIECES` at most; None once all has been told.

        Others have a turn before the rest of a pile.
        """
        if self._is_over:
            return None
        if self._has_left:
            await asyncio.sleep(0)
        while not self._pieces and self._failure is None:
            if not self._num_open:
                return None
            self._wake.clear()
            await self._wake.wait()
        pieces = [self._pieces.popleft() for _ in range(min(MOST_PIECES, len(self._pieces)))]
        self._has_left = bool(self._pieces)
        if self._has_left or self._failure is None:
            return Batch(pieces, None)
        self._is_over = True
        return Batch(pieces, self._failure)


class Stream:
    """The sink of one prompt: its choices' texts, its usage, its measurements."""

    def __init__(
        self,
        mailbox: Mailbox,
        model: TextModel,
        observer: Observer,
        choices: range,
        stops: tuple[str, ...],
        min_tokens: int,
    ) -> None:
        self._mailbox = mailbox
        self._observer = observer
        self._choices = [ChoiceText(model, choice, stops, min_tokens) for choice in choices]
        self.cached_tokens = 0
        self.queued: Started | None = None
        """What was told when it first started: how long it waited, and what had been expected."""
        self._is_started = False

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    def started(self, message: Started, now: float) -> None:
        """Cached tokens are those of the first attempt: later ones find what it left behind."""
        if not self._is_started:
            self._is_started = True
            self.cached_tokens = message.cached_tokens
            self.queued = message
            self._observer.started(message.queue_seconds, now)

    def token(self, choice: int, token: int, now: float) -> FinishReason | None:
        """Text goes on; the finish reason is that of a stop string."""
        piece = self._choices[choice].push_token(token)
        self._observer.tokens(choice, 1, now)
        return self._put(piece)

    def tokens(self, accepted: Accepted, now: float) -> FinishReason | None:
        """Text goes on; the finish reason counts stop strings in."""
        choice = self._choices[accepted.choice]
        before = choice.num_tokens
        piece = choice.push(accepted)
        self._observer.tokens(accepted.choice, choice.num_tokens - before, now)
        return self._put(piece)

    def _put(self, piece: Piece | None) -> FinishReason | None:
        if piece is None:
            return None
        self._mailbox.put(piece)
        if piece.finish is not None:
            self._observer.finished(piece.finish)
        return piece.finish

    def resubmitted(self) -> None:
        """The client notices nothing but a pause."""
        self._observer.resubmitted()

    def ended(self, ending: Ending, now: float) -> None:
        """The one end."""
        self._observer.ended(ending, now)
        self._mailbox.put(ending)
