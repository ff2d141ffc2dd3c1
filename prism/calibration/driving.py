"""Runs engines' steps back to back, two queued on each lane as the worker has them, and times them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from prism.calibration.models import LoadedModel
from prism.engine.engine import EngineRequest
from prism.engine.runner import InFlight
from prism.engine.step import Step
from prism.errors import PrismError
from prism.types import RequestId, SamplingParams

DEPTH = 2
VOCAB = 200
"""Prompts are of the first tokens, which every vocabulary has."""

clock = time.perf_counter


class NoRoom(PrismError):
    """Work is there, and memory for it will never come."""


class Ran(NamedTuple):
    """A step that has run."""

    place: int
    """Of its model in the list."""
    step: Step
    seconds: float
    """Since the step before it on the lane had run, or since it was queued."""
    end: float


@dataclass(slots=True)
class _Lane:
    queue: deque[tuple[InFlight, float]] = field(default_factory=deque)
    last_end: float = 0.0


class Driver:
    """Some models, each on a lane of its own."""

    def __init__(self, models: Sequence[LoadedModel], budget: int) -> None:
        """Steps have at most `budget` tokens."""
        self._models = models
        self._budget = budget
        self._lanes = [_Lane() for _ in models]

    def turn(self, *, may_queue: bool = True) -> list[Ran]:
        """Commit what has run, and queue more of each model that has work."""
        ran = []
        for place, (model, lane) in enumerate(zip(self._models, self._lanes, strict=True)):
            while lane.queue and lane.queue[0][0].is_done():
                ran.append(self._commit(place, model, lane))
            if may_queue and len(lane.queue) < DEPTH and model.engine.scheduler.has_work:
                self._queue(model, lane)
        return ran

    def _commit(self, place: int, model: LoadedModel, lane: _Lane) -> Ran:
        now = clock()
        flight, begin = lane.queue.popleft()
        model.engine.commit(flight)
        ran = Ran(place, flight.step, now - max(begin, lane.last_end), now)
        lane.last_end = now
        return ran

    def _queue(self, model: LoadedModel, lane: _Lane) -> None:
        engine = model.engine
        missing = sum(w.num_blocks for w in engine.scheduler.wants(self._budget)) - engine.kv.num_free
        engine.kv.drop_cached(max(0, missing))
        begin = clock()
        step = engine.schedule(self._budget)
        if step is not None:
            flight = engine.run(step)
            flight.launch()
            lane.queue.append((flight, begin))
        elif not lane.queue:
            raise NoRoom(f"{model.name}: no step has room in {model.num_blocks} blocks")

    @property
    def is_idle(self) -> bool:
        """Nothing is queued, and nobody has anything to do."""
        return not any(lane.queue for lane in self._lanes) and all(m.engine.is_idle for m in self._models)

    def prepare(self) -> None:
        """Have captured what steps have been found to lack."""
        while self._models[0].device.backend.work_aside(0.05, urgent_only=False):
            pass

    def end(self) -> None:
        """Drop all requests, once what is queued has run, and what the prefix caches hold."""
        while any(lane.queue for lane in self._lanes):
            self.turn(may_queue=False)
        for model in self._models:
            scheduler = model.engine.scheduler
            for sequence in [*scheduler.running, *scheduler.waiting]:
                scheduler.remove(sequence)
            model.kv.drop_cached(model.kv.num_cached)


def add_request(model: LoadedModel, name: str, prompt: Sequence[int], max_tokens: int) -> None:
    """It draws at random, as requests do by default: on a CPU that is a tenth of a small model's step."""
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    model.engine.add(EngineRequest(RequestId(name), list(prompt), params))


def random_prompt(random: np.random.Generator, length: int) -> list[int]:
    """Random tokens."""
    ids: list[int] = random.integers(0, VOCAB, length).tolist()
    return ids
