"""Garbage collections of a process that simulates."""

from __future__ import annotations

import gc

YOUNG = 100_000
"""Objects that are made, beyond those that are gone, before the youngest are looked at."""


def collect_rarely() -> None:
    """For a process that does nothing else. An hour of 32 models makes millions of objects that their counts
    free, and no cycles: looking for some every 700 objects took a tenth of the time."""
    gc.set_threshold(YOUNG, 50, 100)
