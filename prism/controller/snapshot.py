"""What placement sees: values only, taken at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism.types import ModelId, WorkerId

CALM = 10
"""Cooldowns after which a move does not count as a repetition."""


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """One model: what it takes, and what was asked of it lately."""

    model: ModelId
    weights_bytes: int
    kv_bytes_per_token: int = 0
    kv_floor_bytes: int = 0
    tpot: float = 0.2
    """Objective between two tokens, in seconds."""
    token_rate: float = 0.0
    """Prompt tokens of requests that started, and decoded ones, a second."""
    compute: float = 0.0
    """Share of the time of a device of speed 1 that its objectives ask for, and a part of what it takes."""
    ttft: float = 2.0
    """Objective of the first token, in seconds."""
    request_rate: float = 0.0
    """Requests that started, a second."""
    late: float = 0.0
    """Share of them whose first token was late for want of the device, beyond doubt."""
    is_still_late: bool = True
    """Some of them since its newest home was ready."""
    blocked: tuple[float, ...] = ()
    """Shares of the time in which who comes waits longer than each of `WAITS` for the end of its steps."""
    noise: float = 0.0
    """Relative standard deviation of both, as measured: requests come at random."""
    replicated_at: float = float("inf")
    """`compute` when it last got one more home, as far as is known."""
    move_seconds: float = 0.0
    """What a migration costs: the load's time on the target's link, and computing again what was cached."""
    tp: int = 1
    """Over so many devices its weights are split."""
    device: WorkerId | None = None
    """Where the configuration wants it."""
    is_wanted: bool = False
    """It has unfinished requests, is in memory and was used not long ago, or must be kept loaded."""
    resident: frozenset[WorkerId] = frozenset()
    """Where it is in memory, or on its way there, because somebody has asked for it."""
    is_ahead: bool = False
    """It is in memory somewhere though nobody has."""
    is_pinned: bool = False
    """It gives way to nobody."""

    @property
    def is_live(self) -> bool:
        """Memory is reserved for it where it lives; of an idle model only the home is known."""
        return self.is_wanted or self.token_rate > 0 or self.compute > 0


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One device."""

    worker: WorkerId
    memory_bytes: int
    """For weights and KV."""
    slab_bytes: int = 1
    speed: float = 1.0
    """Of its steps, relative to the others."""
    is_up: bool = True


@dataclass(frozen=True, slots=True)
class Home:
    """A device on which a model lives: a replica, or a part of a tensor-parallel model."""

    worker: WorkerId
    since: float = float("-inf")
    """When it was last decided on; so long ago that a move may follow, if nobody did."""
    num_moves: int = 0
    """Migrations that soon followed one another; each doubles the wait for the next."""
    has_failed: bool = False
    """The last one of the model came to nothing."""

    def moved(self, worker: WorkerId, now: float, cooldown: float) -> Home:
        """The home after a migration."""
        is_soon = now - self.since < CALM * cooldown
        return Home(worker, now, self.num_moves + 1 if is_soon else 0)


@dataclass(frozen=True, slots=True)
class Policy:
    """How willing placement is to change something. All of it is in `docs/design/placement.md`."""

    gain: float = 0.1
    """A move lowers the higher pressure of its two devices by more than this (of theirs, beyond 1)..."""
    doubt: float = 2.0
    """... and so many standard deviations of what was measured."""
    cooldown: float = 120.0
    """Seconds that a model stays where it was put."""
    horizon: float = 60.0
    """Seconds within which a move's gain has earned back what it costs."""
    max_moves: int = 2
    """Migrations that one round starts."""
    replicate_above: float = 0.85
    """Share of a device's time from which on one home is too little."""
    merge_below: float = 0.5
    """Share of a device's time that the remaining homes may have after one less."""


@dataclass(frozen=True, slots=True)
class PlacementSnapshot:
    """All models and devices, and what was decided before."""

    models: tuple[ModelNeed, ...]
    devices: tuple[DeviceState, ...]
    homes: dict[ModelId, tuple[Home, ...]] = field(default_factory=dict)
    busy: frozenset[ModelId] = frozenset()
    """Models that are being moved: they count where they are and where they go to, and nothing is decided."""
    policy: Policy = Policy()
