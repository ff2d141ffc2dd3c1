"""Begins again when nothing moves although it could; see standstill.py."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prism.errors import Unavailable
from prism.types import ModelState
from prism.worker.endings import Endings
from prism.worker.models import Model
from prism.worker.standstill import Standstill

if TYPE_CHECKING:
    from prism.worker.loop import Worker

log = logging.getLogger(__name__)


def end_standstill(worker: Worker, standstill: Standstill, endings: Endings, now: float) -> None:
    """If there is one, take all that was admitted off the device."""
    admitted = [ticket for ticket in worker.requests if ticket.is_running]
    states = tuple(model.state for model in worker.models.values())
    moving = (ModelState.LOADING, ModelState.EVICTING)
    if not admitted or any(state in moving for state in states):
        standstill.ended(now)
        return
    drawn = sum(model.usage.decoded_tokens for model in worker.models.values())
    if not standstill.lasts((drawn, states, len(worker.requests), len(admitted)), now):
        return
    log.error("nothing moves, beginning again: %s", _outline(worker, now))
    for model in [m for m in worker.models.values() if m.is_active and worker.requests.has_any(m.name)]:
        worker.evict(model)
        for ticket in worker.requests.of_model(model.name):
            if ticket.is_running:  # and no engine knows of it
                endings.refuse(ticket, Unavailable("the request was lost; try again"))


def _outline(worker: Worker, now: float) -> str:
    """Who holds and who waits for what."""
    pool = worker.device.pool
    parts = [f"{pool.num_free} slabs free, {pool.num_retiring} retiring"]
    return "; ".join(parts + [_outline_of(worker, model, now) for model in worker.models.values()])


def _outline_of(worker: Worker, model: Model, now: float) -> str:
    scheduler = None if model.engine is None else model.engine.scheduler
    queued = ((), ()) if scheduler is None else (scheduler.running, scheduler.waiting)
    sequences = [[(s.rank[1][:8], s.num_missing, s.num_pending) for s in each] for each in queued]
    slabs = 0 if model.kv is None else model.kv.num_slabs
    stalled = max(0.0, model.stalled_until - now)
    return (
        f"{model.name} {model.state}, {slabs} slabs of KV, stalled for {stalled:.1f} s, "
        f"early {model.early is not None}, runs {sequences[0]}, waits {sequences[1]}, "
        f"requests {[t.request_id[:8] for t in worker.requests.of_model(model.name)]}"
    )
