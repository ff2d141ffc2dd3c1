"""A device's memory as it says itself, beside what is counted here."""

from __future__ import annotations

import logging

from prism.errors import DriverError
from prism.types import Bytes, MiB
from prism.worker.device import Device

log = logging.getLogger(__name__)

MOST_GROWTH = Bytes(256 * MiB)
"""Since the last warning, or since the least that was seen after it."""


class MemoryWatch:
    """Notices memory that nobody counts: other programs have it, the driver has it, or it is lost."""

    def __init__(self, device: Device, name: str) -> None:
        self._device = device
        self._name = name
        self._told: Bytes | None = None
        self.unaccounted = Bytes(0)
        """In use by the device's account, by nobody's here; of a GPU its context, kernels and other programs.
        As of the last look."""

    def look(self) -> None:
        """Compare both; the log tells when much has come. A device that does not answer fails elsewhere."""
        try:
            reported = self._device.driver.memory_info()
        except DriverError:
            log.exception("%s: the device does not say how much of its memory is used", self._name)
            return
        unaccounted = self._device.ledger().unaccounted(reported)
        self.unaccounted = Bytes(max(0, unaccounted))  # less than counted: pages that nobody has touched
        self._told = self.unaccounted if self._told is None else min(self._told, self.unaccounted)
        growth = self.unaccounted - self._told
        if growth > MOST_GROWTH:
            self._told = self.unaccounted
            log.warning(
                "%s: %d MiB of the device are used that nobody counts, %d MiB more than before:"
                " by another program, by the driver for kernels or registered memory, or they are lost",
                self._name,
                self.unaccounted // MiB,
                growth // MiB,
            )
