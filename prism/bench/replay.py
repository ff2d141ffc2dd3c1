"""Sends requests at their times, whatever the server does, and records how each of them ended."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from prism.bench.connections import Call, Pool, clock
from prism.bench.outcomes import Failed, Record
from prism.bench.targets import Address
from prism.bench.workload import Planned
from prism.errors import ConfigError

LEAD_SECONDS = 0.05
"""Between the start and the first request."""
INTERRUPTED = "interrupted"
EARLY_SECONDS = 0.0005
"""The loop's timers count whole milliseconds; who is due within half of one leaves now."""


class Run(NamedTuple):
    """What was measured."""

    records: list[Record]
    """One for each request, in the order of the plan."""
    duration: float
    """From the first request's time to the last end."""


class Replay:
    """One run. Open loop, unless `max_concurrency` has requests wait in the client."""

    def __init__(
        self,
        planned: Sequence[Planned],
        requests: Sequence[bytes],
        *,
        timeout: float,
        max_concurrency: int | None = None,
        on_end: Callable[[Record], None] | None = None,
    ) -> None:
        assert len(planned) == len(requests)
        self._planned = planned
        self._requests = requests
        self._timeout = timeout
        self._max_active = max_concurrency
        self._on_end = on_end
        self._records: dict[int, Record] = {}
        self._waiting: deque[int] = deque()
        self._calls: dict[int, Call] = {}
        """Under way, by place in the plan."""
        self._is_stopped = False
        self._next = 0
        self._begin = 0.0
        self._pools: dict[Address, Pool] = {}
        self._all_ended = asyncio.Event()

    async def run(self) -> Run:
        """To the end of the last request. Raises `ConfigError` for a host that has no address."""
        for address in {request.target.address for request in self._planned}:
            self._pools[address] = pool = Pool(address)
            try:
                await pool.resolve()
            except OSError as error:
                raise ConfigError([f"{address.host}: {error}"]) from None
        self._begin = clock() + LEAD_SECONDS
        self._send_due()
        try:
            await self._all_ended.wait()
        finally:
            for pool in self._pools.values():
                await pool.close()
        records = [self._records[i] for i in range(len(self._planned))]
        return Run(records, max(record.end for record in records))

    def stop(self) -> None:
        """End now: what is under way or has not left yet has failed."""
        self._is_stopped = True
        now = clock() - self._begin
        for place, request in enumerate(self._planned):
            call = self._calls.get(place)
            if call is not None:
                call.abandon(Failed(INTERRUPTED))
            elif place not in self._records:
                self._record(place, Record(request, now, (), now, 0, 0, Failed(INTERRUPTED)))

    def _send_due(self) -> None:
        """Send what is due, and come again for the next one."""
        if self._is_stopped:
            return
        loop = asyncio.get_running_loop()
        while self._next < len(self._planned):
            wait = self._begin + self._planned[self._next].at - clock()
            if wait > EARLY_SECONDS:
                loop.call_later(wait, self._send_due)
                return
            self._waiting.append(self._next)
            self._next += 1
            self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and not self._is_stopped:
            if self._max_active is not None and len(self._calls) >= self._max_active:
                return
            place = self._waiting.popleft()
            call = Call(self._requests[place], self._timeout, partial(self._ended, place))
            self._calls[place] = call
            self._pools[self._planned[place].target.address].send(call)

    def _ended(self, place: int, call: Call) -> None:
        assert call.outcome is not None
        del self._calls[place]
        answer, request, begin = call.answer, self._planned[place], self._begin
        usage = answer.usage
        record = Record(
            request=request,
            start=call.start - begin,
            times=tuple(time - begin for time in answer.times),
            end=call.end - begin,
            input_tokens=request.prompt if usage is None else usage.prompt_tokens,
            output_tokens=len(answer.times) if usage is None else usage.completion_tokens,
            outcome=call.outcome,
        )
        self._record(place, record)
        self._send_waiting()

    def _record(self, place: int, record: Record) -> None:
        assert place not in self._records, "a request has ended twice"
        self._records[place] = record
        if self._on_end is not None:
            self._on_end(record)
        if len(self._records) == len(self._planned):
            self._all_ended.set()
