"""Carries out what the controller commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from prism.errors import NoRoom
from prism.messages import Abandon, Activate, Evict, SetLimits
from prism.types import ModelState
from prism.worker.models import Model, limit_slabs, slabs_up

if TYPE_CHECKING:
    from prism.worker.loop import Worker


def carry_out(worker: Worker, command: Activate | Evict | SetLimits) -> None:
    """Start what is commanded. `CommandDone` follows now, or when the model has come or gone."""
    model = worker.models.get(command.model)
    if model is None:
        worker.command_done(command, f"model {command.model!r} is not configured")
        return
    match command:
        case Activate():
            _activate(worker, model, command)
        case Evict():
            _evict(worker, model, command)
        case SetLimits():
            _set_limits(worker, model, command)
        case _:
            assert_never(command)


def _activate(worker: Worker, model: Model, command: Activate) -> None:
    if model.is_barred:
        worker.command_done(command, f"model {model.name} cannot be loaded: {model.error}", conflicts=True)
        return
    if command.pinned and worker.rules.is_exclusive:
        reason = "nothing can be pinned in this mode: one model has the device at a time"
        worker.command_done(command, reason, conflicts=True)
        return
    if not model.is_active and not _may_load(worker, model, command):
        return
    if not model.load_commands:
        model.was_pinned, model.was_wanted = model.pinned, model.is_wanted
    model.pinned = model.pinned if command.pinned is None else command.pinned
    worker.room_changed()
    if model.is_active:
        model.is_ahead = False
        worker.command_done(command, pinned=model)
        return
    model.is_wanted = True
    model.load_commands.append(command.command_id)
    worker.residency.want(model)


def _may_load(worker: Worker, model: Model, command: Activate) -> bool:
    """Whether the model can be loaded at all; if not, the command is answered and has changed nothing."""
    model.retry_at = 0.0
    worker.learn(model)
    lacking = worker.room.lacking(model)
    if lacking is None and model.state is not ModelState.FAILED:
        return True
    reason = model.error if lacking is None else str(lacking)
    worker.command_done(command, reason, conflicts=isinstance(lacking, NoRoom))
    return False


def abandon(worker: Worker, command: Abandon) -> None:
    """Somebody has waited long enough for a load: unless others want it, too, it is as if never asked for."""
    for model in worker.models.values():
        if command.command_id not in model.load_commands:
            continue
        model.load_commands.remove(command.command_id)
        if model.load_commands:
            continue
        model.pinned, model.is_wanted = model.was_pinned, model.was_wanted
        if not worker.holdings.is_asked_for(model):
            worker.residency.forget(model)
        worker.room_changed()


def _evict(worker: Worker, model: Model, command: Evict) -> None:
    """What runs is suspended with its tokens before it is returned: none is lost or repeated."""
    if worker.requests.has_any(model.name) and not command.returns:
        worker.command_done(command, f"model {model.name} has unfinished requests", conflicts=True)
        return
    model.is_wanted, model.is_sent_away = False, not command.moved
    model.pinned = model.pinned and not command.moved
    if model.is_active:
        model.evict_commands.append(command.command_id)
        worker.evict(model)
        worker.return_requests(model)
        worker.room_changed()
        return
    worker.return_requests(model)
    if model.load is not None:
        model.evict_commands.append(command.command_id)
        worker.residency.cancel_load(model)
    elif model.is_evicting:
        model.evict_commands.append(command.command_id)
    else:
        worker.residency.forget(model)
        worker.command_done(command)
    worker.room_changed()


def _set_limits(worker: Worker, model: Model, command: SetLimits) -> None:
    model.kv_floor = slabs_up(command.kv_floor_bytes, worker.device.slab_bytes)
    model.kv_limit = limit_slabs(command.kv_limit_bytes, worker.device.slab_bytes)
    model.retry_at = 0.0  # it may have failed by what it was to have until now
    worker.reclaimer.trim(model)
    worker.room_changed()
    worker.memory_changed()
    worker.command_done(command, pinned=model)
