"""A worker's record of each configured model: what it is, where it is, what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prism.config import ModelConfig
from prism.engine.engine import Engine
from prism.engine.kv_blocks import KvSpace
from prism.engine.kv_layout import KvLayout, plan_kv_layout
from prism.errors import CheckpointError
from prism.memory.arena import Arena
from prism.modelspec import ModelSpec, read_spec
from prism.types import Bytes, ModelId, ModelState, SlabId
from prism.weights.layout import Layout, plan_layout
from prism.worker.foresight import CacheHits, IdleTimes, OutputLengths, UseTimes
from prism.worker.lanes import Flight, Lane
from prism.worker.loading import Load
from prism.worker.usage import Usage


@dataclass(frozen=True, slots=True)
class Profile:
    """What a model's directory tells, in the device's units."""

    spec: ModelSpec
    weights: Layout
    kv: KvLayout
    arena_bytes: Bytes
    """Weights and rotary table, in whole slabs."""
    rotary_offset: Bytes
    weight_slabs: int


def configured_spec(config: ModelConfig) -> ModelSpec:
    """A model's spec as its configuration wants it. Raises `CheckpointError`."""
    return read_spec(
        config.path,
        dtype=config.dtype,
        max_len=config.max_model_len,
        quantization=config.quantization,
    )


def read_profile(config: ModelConfig, slab_bytes: Bytes) -> Profile:
    """Reads a model directory. Raises `CheckpointError`."""
    spec = configured_spec(config)
    weights = plan_layout(spec)
    kv = plan_kv_layout(spec, slab_bytes)
    if kv is None:
        raise CheckpointError(
            f"a KV block of {16 * spec.kv_bytes_per_token} bytes does not fit a slab of {slab_bytes}; "
            "use larger slabs",
            file=config.path,
        )
    rotary_offset = Bytes(-(-weights.total_bytes // 256) * 256)
    arena = rotary_offset + spec.max_position * spec.position_bytes
    slabs = -(-arena // slab_bytes)
    return Profile(
        spec=spec,
        weights=weights,
        kv=kv,
        arena_bytes=Bytes(slabs * slab_bytes),
        rotary_offset=rotary_offset,
        weight_slabs=slabs,
    )


@dataclass(slots=True, eq=False)
class Model:
    """One model of a worker. Only the worker's loop touches it."""

    config: ModelConfig
    kv_floor: int
    """Slabs of KV that nobody takes from it while it is active."""
    kv_limit: int | None
    pinned: bool
    state: ModelState = ModelState.COLD
    profile: Profile | None = None
    arena: Arena | None = None
    weight_slabs: tuple[SlabId, ...] = ()
    arena_slabs: tuple[SlabId, ...] = ()
    """What its arena shows, or may show. After an eviction for a while: then they may be others' already."""
    kv: KvSpace | None = None
    engine: Engine | None = None
    lane: Lane | None = None
    """Where its steps run, once it has been loaded for the first time."""
    load: Load | None = None
    is_readable: bool = False
    """In its present, or last, load: enough of its weights has arrived for its first step to begin."""
    early: Flight | None = None
    """Its first step, launched while it is loaded; committed when the load has ended well."""
    has_stepped_early: bool = False
    """In its present, or last, load."""
    packed_share: float = 0.0
    """How much of its weights has been packed."""
    is_packed: bool = False
    """The agent holds its packed weights in host memory."""
    is_held: bool = False
    """The agent has told, unasked, that it holds them."""
    is_at_home: bool = False
    """It lives here, as the controller has said."""
    is_ahead: bool = False
    """It is in memory, or on its way there, though nobody has asked for it since it was not."""
    is_sent_away: bool = False
    """By an administrator; it comes back when somebody asks for it."""
    is_open: bool = True
    """It takes requests in; in mode timeshare only one model does."""
    is_barred: bool = False
    """The mode leaves no room for it, now and later."""
    is_wanted: bool = False
    """To be loaded although no request asks for it: by command or by configuration."""
    stalled_until: float = 0.0
    """Its last turn could not run for want of memory; it is tried again then, or when memory changes."""
    lacks_room: bool = False
    """It failed since pinned models leave it no room."""
    error: str | None = None
    retry_at: float = 0.0
    num_failures: int = 0
    num_unmap_failures: int = 0
    last_used: float = 0.0
    active_since: float = 0.0
    last_turn: float = 0.0
    load_started: float = 0.0
    load_seconds: float = 0.0
    """From the wish for it to its activity, the last time."""
    num_activations: int = 0
    num_evictions: int = 0
    output_lengths: OutputLengths = field(default_factory=OutputLengths)
    idle_times: IdleTimes = field(default_factory=IdleTimes)
    use_times: UseTimes = field(default_factory=UseTimes)
    """Of its prefix cache, since it was loaded."""
    cache_hits: CacheHits = field(default_factory=CacheHits)
    usage: Usage = field(default_factory=Usage)
    load_commands: list[int] = field(default_factory=list)
    was_pinned: bool = False
    """Before the load commands that are under way: so it is again if nothing comes of them."""
    was_wanted: bool = False
    """The same."""
    evict_commands: list[int] = field(default_factory=list)

    @property
    def name(self) -> ModelId:
        """Its name in the configuration."""
        return ModelId(self.config.name)

    @property
    def is_waiting_for_slabs(self) -> bool:
        """Its packed weights are in host memory, and the pool has no room for them yet."""
        return self.state is ModelState.FETCHING and self.is_packed

    @property
    def is_evicting(self) -> bool:
        """Its weights' slabs will come back to the pool."""
        return self.state is ModelState.EVICTING

    @property
    def is_active(self) -> bool:
        """It can run steps now."""
        return self.state is ModelState.ACTIVE

    @property
    def is_settled(self) -> bool:
        """Active, and no step of it is half launched: its blocks may move, and its slabs leave behind it.

        The rest of a first step, launched as weights arrived, may be launched when the load has ended; the
        lane does not count it before.
        """
        return self.is_active and (self.early is None or self.early.is_launched)

    @property
    def is_arriving(self) -> bool:
        """It is being loaded and can be given its first step."""
        if self.load is None or self.load.is_cancelled:
            return False
        return self.is_readable and not self.has_stepped_early

    @property
    def takes_requests(self) -> bool:
        """Requests may enter its engine, as far as there is room."""
        return self.is_open and (self.is_active or self.is_arriving)


def likely_order(models: Iterable[Model]) -> list[ModelId]:
    """Models by how likely they are loaded next: those to be kept loaded, then the last used ones."""
    kept = sorted(models, key=lambda m: (not (m.pinned or m.config.preload), -m.last_used))
    return [model.name for model in kept]


def slabs_up(size: int, slab_bytes: Bytes) -> int:
    """Slabs that hold so many bytes."""
    return -(-size // slab_bytes)


def limit_slabs(size: int | None, slab_bytes: Bytes) -> int | None:
    """A limit in whole slabs, one at least; None is no limit."""
    return None if size is None else max(1, size // slab_bytes)
