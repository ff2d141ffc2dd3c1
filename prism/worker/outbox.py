"""Where a worker's messages go."""

from __future__ import annotations

from typing import Protocol

from prism.messages import CommandDone, Outputs, Rejected, Returned, Started, WeightsWanted
from prism.types import GatewayId


class Outbox(Protocol):
    """Sends without waiting. A receiver that is gone is no error."""

    def to_gateway(self, gateway: GatewayId, message: Started | Outputs | Rejected | Returned) -> None:
        """About one gateway's requests."""
        ...

    def to_agent(self, message: WeightsWanted) -> None:
        """To the process that owns the host weight store."""
        ...

    def to_controller(self, message: CommandDone) -> None:
        """The end of a command."""
        ...
