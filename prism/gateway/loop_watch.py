"""Notices that a gateway's event loop stands still, by how late a timer comes."""

from __future__ import annotations

import asyncio

from prism.clock import Clock
from prism.metrics import Metrics
from prism.stalls import STALL_SECONDS, Stalls

LOOK_SECONDS = 0.1
"""A standstill seems this much too short at the most."""


async def watch_loop(process: str, clock: Clock, metrics: Metrics) -> None:
    """Count and tell until cancelled."""
    stalls, never = Stalls(process), asyncio.Event()
    count, seconds = metrics.loop_stalls.labels(process), metrics.loop_stall_seconds.labels(process)
    while True:
        due = clock.now() + LOOK_SECONDS
        await clock.wait(never, due)
        now = clock.now()
        late = now - due
        if late > STALL_SECONDS:
            stalls.note(late, "a timer came so late", now)
            count.inc()
            seconds.inc(late)
        stalls.tell(now)
