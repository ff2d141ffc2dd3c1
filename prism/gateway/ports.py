"""What the dispatcher talks to: links to other processes, and one sink per request."""

from __future__ import annotations

from typing import Protocol

from prism.gateway.requests import Accepted, Ending, Placement
from prism.messages import CancelChoice, Demand, Started, Submit
from prism.types import FinishReason


class Links(Protocol):
    """Sends without waiting. A receiver that is gone is no error: the agent tells of its end."""

    def to_worker(self, placement: Placement, message: Submit | CancelChoice) -> None:
        """To one incarnation of a worker."""
        ...

    def to_controller(self, message: Demand) -> None:
        """To the controller, if there is one; a new one is told again."""
        ...


class Sink(Protocol):
    """Where a request's news go. Called from the dispatcher, so it returns at once."""

    def started(self, message: Started, now: float) -> None:
        """An attempt runs."""
        ...

    def token(self, choice: int, token: int, now: float) -> FinishReason | None:
        """One more token and nothing else of a choice; see `tokens`."""
        ...

    def tokens(self, accepted: Accepted, now: float) -> FinishReason | None:
        """New tokens; the answer is the choice's finish reason, its stop strings included."""
        ...

    def resubmitted(self) -> None:
        """Its worker died or gave it back; it goes on."""
        ...

    def ended(self, ending: Ending, now: float) -> None:
        """The one end."""
        ...
