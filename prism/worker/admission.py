"""Which waiting requests enter their engines now. Pure.

Taken when requests come or end, over all that wait: O(n log n). An engine is given no more prompts than keep
the device busy for a moment, so that later arrivals with earlier deadlines are not behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter
from typing import NamedTuple

from prism.types import ModelId, ModelState, RequestId
from prism.worker.on_time import select
from prism.worker.snapshot import AdmissionSnapshot, ModelLoad, WaitingRequest

LATE_PART = 0.03
"""Of the tightest TTFT objective, the prompts beside which a late one may enter. Where objectives are loose
that makes steps which use the device well: one by one, a burst on a 1B has 0.81 of the tokens a second."""
LATE_SHARE = 0.1
"""Of the time that prompts take, the share that late ones are owed while others go first."""
_AGE = attrgetter("arrival", "request_id")


@dataclass(frozen=True, slots=True)
class Admit:
    """Give the request to its engine."""

    request_id: RequestId
    is_late: bool = False
    """It cannot have its first token in time; what it takes is counted against what late ones are owed."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Refuse the request: it has waited for as long as it may."""

    request_id: RequestId


AdmissionDecision = Admit | Expire


class Admission(NamedTuple):
    """What is to be done now, and what the next decision has to know of this one."""

    decisions: tuple[AdmissionDecision, ...]
    owed_to_late: float


def decide(snapshot: AdmissionSnapshot, now: float) -> Admission:
    """Those that can be in time by deadline, the late ones behind them with a share of their own.

    1. A request that has waited too long expires.
    2. While a suspect runs alone, nobody else enters.
    3. The oldest suspect enters once nothing runs, and alone; while it waits, nobody overtakes it.
    4. The others in their order of service (`Service`).
    5. Requests of models that are not active wait for them, or until a load has come so far that the first
       step can follow it.
    6. Batch size and memory bound what enters; a request that does not fit holds back those behind it in its
       model, so that small ones cannot starve a large one. An idle model always takes one, and one that is
       stuck one that is older than all it has: memory may be there for that and not for them.
    7. Prompts enter as long as those in the engines take less than the horizon; a late one only while they
       take less than `room_for_late`, unless it is owed its place: an engine computes in the order of
       arrival, so whoever comes in time is behind all late ones that are in there.
    """
    expired = tuple(Expire(r.request_id) for r in snapshot.waiting if r.expires <= now)  # 1
    waiting: Sequence[WaitingRequest] = snapshot.waiting
    if expired:
        waiting = [r for r in waiting if r.expires > now]
    if snapshot.alone_is_running:  # 2
        return Admission(expired, snapshot.owed_to_late)
    suspects = [r for r in waiting if r.alone]
    able = [r for r in suspects if snapshot.models[r.model].state is ModelState.ACTIVE]
    if able:  # 3
        first = min(able, key=lambda r: (r.arrival, r.request_id))
        enters = () if snapshot.num_running_requests else (Admit(first.request_id),)
        return Admission((*expired, *enters), snapshot.owed_to_late)
    if suspects:
        waiting = [r for r in waiting if not r.alone]
    service = Service(snapshot, waiting, now)  # 4
    owed = snapshot.owed_to_late
    entering = []
    for place in _admit(snapshot, service):
        entering.append(Admit(place.request.request_id, place.is_late))
        owed = max(0.0, owed + place.change)
    return Admission((*expired, *entering), owed if service.has_late else 0.0)


class Place(NamedTuple):
    """In the order of service."""

    request: WaitingRequest
    is_late: bool
    change: float
    """What it adds to what is owed to late ones."""
    is_owed: bool = False
    """It is late, and goes first all the same."""


class Service:
    """Requests in the order in which they are to be served.

    1. Those of tenants within their share, then the others.
    2. Of either those that can be in time, by deadline, then the late ones, oldest first.
    3. For each second of what goes before it, the oldest late one of all, whoever's, is owed `LATE_SHARE` of
       a second; it goes first once it is owed all that it takes. So it runs after a bounded time whatever
       arrives: when the share of the time has sufficed for it and for all late ones that are older.
    """

    def __init__(self, snapshot: AdmissionSnapshot, waiting: Sequence[WaitingRequest], now: float) -> None:
        self._owed = snapshot.owed_to_late
        self._on_time: list[list[WaitingRequest]] = []
        self._late: list[list[WaitingRequest]] = []
        start = now + snapshot.busy
        for group in _groups(waiting, snapshot.over_share):  # 1
            start += self._select(snapshot, group, start, now)
        self.has_late = any(self._late)
        on_time = chain(*self._on_time)
        self.ttft = min((request.deadline - request.arrival for request in on_time), default=math.inf)
        """The tightest objective of those that can be in time, in seconds."""

    def _select(
        self, snapshot: AdmissionSnapshot, group: Sequence[WaitingRequest], start: float, now: float
    ) -> float:
        """Seconds that those of a group take which can be in time."""
        ready = {name: now + load.ready_in for name, load in snapshot.models.items()}
        stretch = snapshot.stretch  # a prompt beside decodes takes longer than alone
        jobs = [(r.deadline, r.seconds * stretch, ready[r.model]) for r in group]
        selection = select(jobs, start)
        late = [group[index] for index in selection.late]
        self._on_time.append([group[index] for index in selection.on_time])
        self._late.append(sorted(late, key=_AGE))
        return sum(jobs[index][1] for index in selection.on_time)

    def __iter__(self) -> Iterator[Place]:
        owed = self._owed
        gone: set[RequestId] = set()  # late ones that have had their place
        late = self._late[0] if len(self._late) == 1 else sorted(chain(*self._late), key=_AGE)
        by_age = (request for request in late if request.request_id not in gone)
        oldest = next(by_age, None)
        for request, is_late in self._in_turn():
            while oldest is not None and owed >= oldest.seconds:  # 3
                owed -= oldest.seconds
                gone.add(oldest.request_id)
                yield Place(oldest, True, -oldest.seconds, is_owed=True)
                oldest = next(by_age, None)
            if is_late:
                if request.request_id in gone:
                    continue
                gone.add(request.request_id)
            change = request.seconds * LATE_SHARE
            if request is oldest:
                change = -request.seconds
                oldest = next(by_age, None)
            owed = max(0.0, owed + change)
            yield Place(request, is_late, change)

    def _in_turn(self) -> Iterator[tuple[WaitingRequest, bool]]:
        for on_time, late in zip(self._on_time, self._late, strict=True):  # 2
            yield from zip(on_time, repeat(False))
            yield from zip(late, repeat(True))


def _groups(
    waiting: Sequence[WaitingRequest], over_share: frozenset[str | None]
) -> tuple[Sequence[WaitingRequest], ...]:
    if not over_share:
        return (waiting,)
    within = [r for r in waiting if r.tenant not in over_share]
    return within, [r for r in waiting if r.tenant in over_share]


def _can_run(load: ModelLoad) -> bool:
    return load.state is ModelState.ACTIVE or load.is_arriving


def room_for_late(snapshot: AdmissionSnapshot, service: Service) -> float:
    """Seconds that the prompts in engines may take when a late one enters.

    Whoever comes next is computed behind late ones that are in its engine. If its objective is none tighter
    than those of the models that are here and of all that wait and can be in time, it loses `LATE_PART` of it
    by them, and the time of the last one; more where an idle model has taken one in besides.
    """
    tightest = min(snapshot.ttft, service.ttft)
    return min(LATE_PART * tightest / snapshot.stretch, snapshot.horizon)


def _admit(snapshot: AdmissionSnapshot, service: Service) -> Iterator[Place]:
    asked = {request.model for request in snapshot.waiting}
    open_models = {
        name: load for name, load in snapshot.models.items() if name in asked and _can_run(load)
    }  # 5
    places = {name: load.max_sequences - load.num_sequences for name, load in open_models.items()}
    memory = Memory(snapshot.models.values())
    idle = {name for name, load in open_models.items() if not load.num_sequences}
    stuck = {name: load.stuck for name, load in open_models.items() if load.stuck is not None}
    work, room = snapshot.busy, room_for_late(snapshot, service)
    for place in service:
        request = place.request
        model = request.model
        if model not in open_models:
            continue
        is_behind = place.is_late and not place.is_owed
        has_room = work <= 0 or work < (room if is_behind else snapshot.horizon)
        fits = request.num_sequences <= places[model] and memory.fits(model, request.num_blocks)  # 6
        is_older = model in stuck and (request.arrival, request.request_id, 0) < stuck[model]
        if model in idle or is_older or (fits and has_room):  # 7
            idle.discard(model)
            stuck.pop(model, None)
            places[model] -= request.num_sequences
            memory.take(model, request.num_blocks)
            work += request.seconds
            yield place
        elif model in stuck:
            places[model] = 0  # for all but an older one
        else:
            del open_models[model]
        if not open_models or (work >= snapshot.horizon and not idle and not stuck):
            return


class Memory:
    """What models are going to take of slabs that several of them could get: each is promised to one."""

    def __init__(self, loads: Iterable[ModelLoad]) -> None:
        self._loads = {load.model: load for load in loads}
        self._wanted = {name: load.num_blocks_to_come for name, load in self._loads.items()}
        self._promised = {name: self._slabs(name, 0) for name in self._loads}
        self._total = sum(self._promised.values())

    def _slabs(self, model: ModelId, num_blocks: int) -> int:
        load = self._loads[model]
        return max(0, -(-(self._wanted[model] + num_blocks - load.num_blocks) // load.blocks_per_slab))

    def fits(self, model: ModelId, num_blocks: int) -> bool:
        """Whether there is room for so many blocks more."""
        left = self._loads[model].num_slabs - (self._total - self._promised[model])
        return self._slabs(model, num_blocks) <= max(0, left)

    def take(self, model: ModelId, num_blocks: int) -> None:
        """They are promised to the model."""
        slabs = self._slabs(model, num_blocks)
        self._wanted[model] += num_blocks
        self._total += slabs - self._promised[model]
        self._promised[model] = slabs
