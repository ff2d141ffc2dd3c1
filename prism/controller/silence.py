"""Which workers are up and do not report, and which of them have not for so long that they hang. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from prism.types import Seconds, WorkerId

SILENT_SECONDS = 10.0
"""Reports come twice a second; on CPUs none comes before a step has been computed."""


class Silence:
    """Of all workers that are up."""

    def __init__(self, watchdogs: Mapping[WorkerId, Seconds]) -> None:
        """After so long a worker hangs; the others never do."""
        self._watchdogs = watchdogs
        self.workers: frozenset[WorkerId] = frozenset()
        """Those that have been silent for too long."""
        self._hung: set[WorkerId] = set()
        """Those that have been told of."""
        self._heard: dict[WorkerId, float] = {}
        self._looked = 0.0

    def heard(self, worker: WorkerId, now: float) -> bool:
        """It has come up, or reports; whether it was silent before."""
        was_silent = self.ended(worker)
        self._heard[worker] = now
        return was_silent

    def ended(self, worker: WorkerId) -> bool:
        """It is not up any more; whether it was silent before."""
        was_silent = worker in self.workers
        self._heard.pop(worker, None)
        self.workers -= {worker}
        self._hung.discard(worker)
        return was_silent

    def look(self, now: float) -> frozenset[WorkerId]:
        """Those that have become silent. Nobody has, if it was here that nothing was heard meanwhile."""
        if now - self._looked > SILENT_SECONDS / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        silent = {worker for worker, heard in self._heard.items() if now - heard >= SILENT_SECONDS}
        new = frozenset(silent) - self.workers
        self.workers |= new
        return new

    def hung(self, now: float) -> dict[WorkerId, Seconds]:
        """Those that have begun to hang, once each, and for how long each has been silent."""
        silent = {w: Seconds(now - heard) for w, heard in self._heard.items() if w not in self._hung}
        new = {w: seconds for w, seconds in silent.items() if seconds >= self._watchdogs.get(w, math.inf)}
        self._hung |= new.keys()
        return new
