"""A device's memory as it says itself, beside what is counted here."""

from __future__ import annotations

import logging

from prism.types import Bytes, MiB
from prism.worker.device import Device

log = logging.getLogger(__name__)

MOST_GROWTH = Bytes(256 * MiB)
"""Since it was told, or was least."""


class MemoryWatch:
    """Notices memory that nobody counts: other programs have it, or it is lost."""

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self._name = name
        self._told: Bytes | None = None
        self.unaccounted = Bytes(0)
        """In use by the device's account, by nobody's here; of a GPU its context, kernels and other programs.
        As of the last look."""

    def look(self) -> None:
        """Compare both; the log tells when much has come."""
        unaccounted = self._device.ledger().unaccounted(self._device.driver.memory_info())
        self.unaccounted = Bytes(max(0, unaccounted))  # less than counted: pages that nobody has touched
        self._told = self.unaccounted if self._told is None else min(self._told, self.unaccounted)
        growth = self.unaccounted - self._told
        if growth > MOST_GROWTH:
            self._told = self.unaccounted
            log.warning(
                "%s: %d MiB of the device are used that nobody counts, %d MiB more than before:"
                " by another program, or they are lost",
                self._name,
                self.unaccounted // MiB,
                growth // MiB,
            )
