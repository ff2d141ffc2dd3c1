"""Waiting for what other threads and processes do.

Deadlines only say that something hangs, so they are far longer than anything takes on a loaded machine. What
has to be quick is proved by other means: processor time, a count, an event that must come first.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 120.0
"""Seconds. With six busy processes on two cores the slowest of all, a server's start, took 16."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first true value of `condition`. It sleeps in between: who is waited for may need the core."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.001)
    return value


async def eventually(
    condition: Callable[[], Any], what: str, seconds: float = PATIENCE, *, pause: float = 0.02
) -> Any:
    """The same in a coroutine; `condition` may return a coroutine, whose value counts."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(pause)
