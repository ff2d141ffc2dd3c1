"""Brings models onto the device and takes them off again.

    COLD --want--> FETCHING --packed, slabs free--> LOADING --verified--> ACTIVE
      ^               |                                |                    |
      |               └──────────> FAILED <────────────┘                  evict
      |                              | retry_at passes                      |
      └──────────────────────────────┴───────────── EVICTING <──────────────┘

All of it happens on the loop except loading and unloading themselves (loading.py). A model that is LOADING
may run its first step (early.py); if the load ends badly, that is dropped before the end is told here. When a
model is evicted, or its load has ended badly, its slabs come back to the pool at once, behind what is queued.
That its arena still shows them does no harm, but the arena must be empty before the model is loaded again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from prism.engine.engine import Engine
from prism.engine.kv_blocks import KvSpace
from prism.errors import DeviceTooSmall, NoRoom, NotHeld, PrismError
from prism.memory.arena import Arena
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.messages import CommandDone, ResumedChoice, WeightsWanted
from prism.models.decoder import Decoder
from prism.types import ModelState, RequestId, Stamp, WorkerId
from prism.weights.places import Places
from prism.worker.device import Device
from prism.worker.foresight import UseTimes
from prism.worker.host_kv import HostKv
from prism.worker.loading import Load, LoadCancelled, Loaded, LoadPlan, Unloaded, unload
from prism.worker.models import Model, Profile, read_profile
from prism.worker.outside import Outside
from prism.worker.reclaimer import Reclaimer, slabs_to_activate
from prism.worker.room import Room

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before a failed load is tried again."""
UNMAP_DELAYS = (0.0, 0.0, 1.0, 5.0, 30.0)
"""Waits before an arena is unmapped; the later ones after so many failures."""


class Listener(Protocol):
    """What the owner of the requests does when a model's state changes."""

    def requests_suspended(self, choices: dict[RequestId, list[ResumedChoice]]) -> None:
        """Running requests have lost their place and wait again."""
        ...


class Residency:
    """The only place where a model's `state` changes."""

    def __init__(
        self,
        device: Device,
        outside: Outside,
        host: HostKv,
        room: Room,
        worker_id: WorkerId,
        max_batch_size: int,
    ) -> None:
        self._device = device
        self._outside = outside
        self._outbox = outside.outbox
        self._host = host
        self._room = room
        self._leaving: list[tuple[Stamp | None, Model]] = []
        self._clock = outside.clock
        self._max_batch_size = max_batch_size
        self._worker_id = worker_id

    # --- towards active -----------------------------------------------------------------------------

    def learn(self, model: Model) -> None:
        """Read a cold model's directory, once; the model has failed if it can never be loaded."""
        if model.state is ModelState.FAILED and self._clock() >= model.retry_at and not model.is_barred:
            model.state = ModelState.COLD
        if model.state is not ModelState.COLD:
            return
        try:
            if model.profile is None:
                profile = read_profile(model.config, self._device.slab_bytes)
                self._device.backend.check(profile.spec)
                model.profile = profile
            self._room.check(model)
        except PrismError as error:
            self.fail(model, error)

    def want(self, model: Model) -> None:
        """Somebody needs the model: start bringing it in, unless that is under way or has just failed."""
        self.learn(model)
        if model.state is not ModelState.COLD:
            return
        model.state = ModelState.FETCHING
        model.load_started = self._clock()
        registrations = self._outside.registrations
        model.is_packed = registrations is not None and registrations.has_all(model.name)
        self._outbox.to_agent(WeightsWanted(model=model.name))  # even so: the store keeps what is used

    def packed(self, model: Model) -> None:
        """The agent has the weights in host memory."""
        model.is_packed = True

    def try_load(self, model: Model, reclaimer: Reclaimer, now: float) -> None:
        """Start the load if there is room for the model, or ask others for room.

        A model that was evicted a moment ago waits until its arena is empty. One whose floor was raised
        meanwhile, or beside which another was pinned, may never find room; the younger would wait behind it.
        """
        if model.state is not ModelState.FETCHING:
            return
        try:
            self._room.check(model)
        except (DeviceTooSmall, NoRoom) as error:
            self.fail(model, error)
            return
        if not model.is_packed or model.arena_slabs or not reclaimer.ensure_weights(model, now):
            return
        profile = model.profile
        assert profile is not None
        pool = self._device.pool
        model.weight_slabs = pool.take(WeightsOwner(model.name), profile.weight_slabs)
        model.kv = KvSpace(profile.kv)
        model.use_times = UseTimes()
        for slab in pool.take(KvOwner(model.name), slabs_to_activate(model) - profile.weight_slabs):
            model.kv.add_slab(slab)
        try:
            if model.arena is None:
                model.arena = self._device.new_arena(profile.arena_bytes)
        except PrismError as error:
            self._release(model)
            self.fail(model, error)
            return
        if model.engine is None:
            model.engine = self._new_engine(model, profile, model.arena, model.kv)
        model.engine.attach(model.kv)
        model.state = ModelState.LOADING
        model.is_readable = model.has_stepped_early = False
        model.load = self._start_load(model)

    def _start_load(self, model: Model) -> Load:
        arena, profile = model.arena, model.profile
        assert arena is not None and profile is not None
        device, pool, spec = self._device, self._device.pool, profile.spec
        plan = LoadPlan(
            model=model.name,
            layout=profile.weights,
            arena=arena,
            handles=tuple(pool.handle(slab) for slab in model.weight_slabs),
            places=Places(tuple(pool.address(slab) for slab in model.weight_slabs), pool.slab_bytes),
            prepare=lambda: device.backend.prepare(spec),
            fill=lambda: device.write_rotary(profile, arena),
        )
        model.arena_slabs = model.weight_slabs
        pool.add_alias(model.arena_slabs)
        outside = self._outside
        load = Load(plan, outside.fetch, outside.registrations, outside.link, outside.clock)
        outside.jobs.start(load.run)
        return load

    def cancel_load(self, model: Model) -> None:
        """Nobody wants a loading model any more: its slabs come back soon, and it is cold again."""
        assert model.load is not None
        model.load.cancel()
        self._give_up(model, f"model {model.name} was unloaded meanwhile", conflicts=True)

    def loaded(self, model: Model, event: Loaded) -> None:
        """The load has ended, well or not. If not, what it was given to run has been dropped."""
        error = load_error(model, event)
        load, model.load = model.load, None
        if error is not None:
            self._load_failed(model, error)
            return
        assert load is not None
        self._host.open(model, load.digest)
        now = self._clock()
        model.state = ModelState.ACTIVE
        model.active_since = now
        model.num_activations += 1
        if not model.is_ahead:  # that one came when there was nothing else to do
            model.last_used = now
            model.load_seconds = now - model.load_started
        model.num_failures = 0
        model.error = None
        log.info(
            "model %s active after %.3f s (copy %.3f s)", model.name, now - model.load_started, event.seconds
        )
        without_room = self._room.crowded_out_by(model) if model.load_commands else []
        self._answer(model.load_commands, None, without_room=without_room)

    def _new_engine(self, model: Model, profile: Profile, arena: Arena, kv: KvSpace) -> Engine:
        """Bound to a lane for ever, and to the arena's addresses."""
        device, spec = self._device, profile.spec
        lane = model.lane = model.lane or device.bind()
        decoder = Decoder(spec, device.weight_tensors(profile, arena), device.rotary_tensor(profile, arena))
        runner = device.backend.runner(decoder, device.kv_view(spec, profile.kv), lane.lane_id)
        return Engine(kv, runner, lane.slots, max_len=spec.max_position, max_batch_size=self._max_batch_size)

    def _load_failed(self, model: Model, error: Exception) -> None:
        self._release(model)
        self._empty_arena(model)
        if isinstance(error, LoadCancelled):
            self._become_cold(model)
            return
        model.is_held = model.is_held and not isinstance(error, NotHeld)
        if isinstance(error, NotHeld) and model.is_ahead:
            self._become_cold(model)
            return
        if isinstance(error, NotHeld):  # it waited for slabs for so long that the store took it for idle
            model.is_packed = False
            model.state = ModelState.FETCHING
            self._outbox.to_agent(WeightsWanted(model=model.name))
            return
        self.fail(model, error)

    def fail(self, model: Model, error: Exception) -> None:
        """The model cannot be served now; a later want tries again."""
        wait = RETRY_SECONDS[min(model.num_failures, len(RETRY_SECONDS) - 1)]
        model.num_failures += 1
        model.state = ModelState.FAILED
        model.is_packed = model.is_ahead = False
        model.lacks_room = isinstance(error, NoRoom)
        model.error = str(error)
        model.retry_at = self._clock() + wait
        log.error("model %s cannot be loaded: %s", model.name, error)
        self._give_up(model, model.error, conflicts=model.lacks_room)
        model.is_wanted = model.pinned  # a pinned model is tried again for ever

    def forget(self, model: Model) -> None:
        """A model that holds nothing is not wanted any more."""
        if model.state is ModelState.FETCHING:
            self._give_up(model, f"model {model.name} was unloaded meanwhile", conflicts=True)
            self._become_cold(model)

    # --- towards cold -------------------------------------------------------------------------------

    def evict(self, model: Model, reclaimer: Reclaimer, listener: Listener) -> None:
        """Give up all memory of an active model. What it was running waits for its return."""
        assert model.is_active and model.engine is not None
        suspended = model.engine.suspend()
        listener.requests_suspended(suspended)
        reclaimer.release_kv(model)
        model.kv = None
        model.state = ModelState.EVICTING
        model.is_wanted = model.is_ahead = False
        model.num_evictions += 1
        log.info("model %s evicted", model.name)
        self._release(model)
        self._empty_arena(model)

    def _last_reader(self, model: Model) -> Stamp | None:
        """The last queued work that may read the model's weights, or its KV; None if all has run."""
        if model.lane is None:
            return None
        works = [flight.number for flight in model.lane.flights if flight.model == model.name]
        return Stamp(model.lane.lane_id, works[-1]) if works else None

    def _empty_arena(self, model: Model) -> None:
        """Have the arena unmapped beside the loop, once no queued step reads it any more."""
        self._leaving.append((self._last_reader(model), model))
        self.unmap_arenas()

    def unmap_arenas(self) -> None:
        """Start with those arenas whose last readers have completed."""
        leaving, self._leaving = self._leaving, []
        for last, model in leaving:
            if last is None or last.step <= self._device.lanes[last.lane].num_completed:
                self._start_unload(model)
            else:
                self._leaving.append((last, model))

    def _start_unload(self, model: Model) -> None:
        arena = model.arena
        assert arena is not None
        name, delay = model.name, UNMAP_DELAYS[min(model.num_unmap_failures, len(UNMAP_DELAYS) - 1)]
        self._outside.jobs.start(lambda: unload(name, arena, delay))

    def unloaded(self, model: Model, event: Unloaded) -> None:
        """The arena is unmapped, so the model may be loaded again; on an error it is tried again."""
        if event.error is not None:
            log.error("model %s could not be unmapped, trying again: %s", model.name, event.error)
            model.num_unmap_failures += 1
            self._start_unload(model)
            return
        self._device.pool.remove_alias(model.arena_slabs)
        model.arena_slabs = ()
        model.num_unmap_failures = 0
        if model.state is ModelState.EVICTING:
            self._become_cold(model)

    def _become_cold(self, model: Model) -> None:
        model.state = ModelState.COLD
        model.is_packed = model.is_ahead = False
        self._answer(model.evict_commands, None)

    def _release(self, model: Model) -> None:
        """Give back the slabs of a model, for when no queued step can touch them any more.

        KV may have been taken while others' work of the lane was still to run in it.
        """
        pool = self._device.pool
        if model.weight_slabs:
            pool.give_back(WeightsOwner(model.name), model.weight_slabs, self._last_reader(model))
            model.weight_slabs = ()
        if model.kv is not None:
            owned = pool.owned(KvOwner(model.name))
            if owned:
                pool.give_back(KvOwner(model.name), owned, None if model.lane is None else model.lane.stamp())
            model.kv = None

    def _give_up(self, model: Model, error: str, *, conflicts: bool) -> None:
        """Nothing comes of the load commands that are under way: they are over, as is what they pinned."""
        if model.load_commands:
            model.pinned = model.was_pinned
        self._answer(model.load_commands, error, conflicts=conflicts)

    def _answer(
        self,
        commands: list[int],
        error: str | None,
        *,
        conflicts: bool = False,
        without_room: Sequence[str] = (),
    ) -> None:
        for command in commands:
            self._outbox.to_controller(
                CommandDone(
                    command_id=command,
                    worker=self._worker_id,
                    error=error,
                    conflicts=conflicts,
                    without_room=list(without_room),
                )
            )
        commands.clear()


def load_error(model: Model, event: Loaded) -> Exception | None:
    """Why a load that has ended did not end well; one that was called off never does."""
    assert model.load is not None
    return LoadCancelled() if model.load.is_cancelled else event.error
