"""A gateway whose event loop stands still says so."""

from __future__ import annotations

import asyncio
import logging

import pytest

from prism.gateway.loop_watch import LOOK_SECONDS, watch_loop
from prism.metrics import Metrics

pytestmark = pytest.mark.anyio


class LateClock:
    """Whoever waits for it is called as much too late as the test says; then the test is over."""

    def __init__(self, *late: float) -> None:
        self._now = 0.0
        self._late = iter(late)

    def now(self) -> float:
        return self._now

    async def wait(self, event: asyncio.Event, until: float | None) -> None:
        assert until == self._now + LOOK_SECONDS
        late = next(self._late, None)
        if late is None:
            raise asyncio.CancelledError
        self._now = until + late


async def test_late_timers_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with caplog.at_level(logging.WARNING), pytest.raises(asyncio.CancelledError):
        await watch_loop("gateway-0", LateClock(0.0, 0.125, 0.75, 0.2), metrics)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "gateway-0 stood still for up to 0.75 s" in line
    text = metrics.text().decode()
    assert 'prism:loop_stalls_total{process="gateway-0"} 1.0' in text
    assert 'prism:loop_stall_seconds_total{process="gateway-0"} 0.75' in text
