"""What the worker's policies see: values only, taken at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from prism.costs import StepCosts
from prism.types import ModelId, ModelState, Rank, RequestId

FAR = 1e6
"""Seconds to a deadline where there are none: their order is then that of arrival."""
MOST_DECODES = 0.9
"""Share of the time that decodes are thought to take at most: beyond, prompts get what they can."""


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request that no engine has taken in yet. Times are those of the worker's clock, in seconds."""

    request_id: RequestId
    model: ModelId
    arrival: float
    deadline: float
    """Its first token is due: arrival plus TTFT objective."""
    expires: float
    """It is refused when it has not started by then."""
    num_sequences: int
    num_blocks: int
    """KV blocks that its prompt, resumed tokens and the output that is expected fill."""
    alone: bool
    seconds: float = 0.0
    """Of the device, for its prompt alone."""
    tenant: str | None = None
    """Whose it is, where API keys are configured."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """What admission must know of a model."""

    model: ModelId
    state: ModelState
    num_sequences: int
    max_sequences: int
    num_blocks: int
    """Those that hold nothing, or nothing but prefix cache."""
    num_slabs: int
    """That it could get besides, without touching a running sequence; others could get the same ones."""
    blocks_per_slab: int
    num_blocks_to_come: int = 0
    """That the requests which it has are expected to need yet."""
    stuck: Rank | None = None
    """Of its oldest request, if none that it has holds any memory, and there was none for them."""
    is_arriving: bool = False
    """It is being loaded, and its first step can already run behind the copy."""
    ready_in: float = 0.0
    """Seconds until it can run steps, as far as is known."""


@dataclass(frozen=True, slots=True)
class AdmissionSnapshot:
    """All waiting requests and all models of a device."""

    waiting: tuple[WaitingRequest, ...]
    models: dict[ModelId, ModelLoad]
    num_running_requests: int
    alone_is_running: bool
    busy: float = 0.0
    """Seconds that the prompts take which are in engines and not computed yet."""
    stretch: float = 1.0
    """How much longer a prompt takes beside the decodes that run."""
    horizon: float = float("inf")
    """Seconds of prompts that engines may hold."""
    ttft: float = 0.0
    """The tightest objective to the first token of the models that are here, in seconds."""
    owed_to_late: float = 0.0
    """Seconds that late requests may take before those that are on time."""
    over_share: frozenset[str | None] = frozenset()
    """Tenants that have had more than their share (worker/shares.py)."""


class Streams(NamedTuple):
    """Those of a model, on its lane. In order those come first that need the least time each."""

    share_each: float
    model: ModelId
    share: float
    """Of the lane's time, that all of them need."""


def streams_of(model: ModelId, number: int, seconds: float, tpot: float) -> Streams:
    """So many streams whose steps take so long, each at the objective `tpot`."""
    share = seconds / max(tpot, 1e-3)
    return Streams(share / number, model, share)


@dataclass(slots=True)
class Runnable:
    """A model that has sequences to step, or one of another lane that decodes.

    A value like the others. Two are made at each step, though, and a frozen one takes twice as long to make.
    """

    model: ModelId
    deadline: float
    """The earliest next-token deadline among its running sequences."""
    last_turn: float
    num_decodes: int
    decode_deadline: float = float("inf")
    """The earliest one among those that decode."""
    decode_seconds: float = 0.0
    """What a step of its decodes takes."""
    prompt_tokens: int = 0
    """Of its prompts, those not computed yet."""
    prompts: tuple[int, ...] = ()
    """Tokens of each that are not computed yet, in the engine's order; may be left out."""
    prompt_start: int = 0
    """Where the first of these prompts goes on."""
    costs: StepCosts | None = None
    """What its steps cost; None while nothing is known."""
    prompt_deadline: float = float("inf")
    """The earliest deadline among those whose prompts are not computed."""
    tpot: float = float("inf")
    """The objective of its streams, the least of them."""
    due: float = field(init=False)
    """The earliest deadline of all."""
    streams: Streams | None = field(init=False)
    """What those that decode need of a lane."""

    def __post_init__(self) -> None:
        """Each turn asks for both; a model that has not changed brings them along."""
        self.due = min(self.deadline, self.prompt_deadline)
        self.streams = None
        if self.num_decodes:
            self.streams = streams_of(self.model, self.num_decodes, self.decode_seconds, self.tpot)


@dataclass(frozen=True, slots=True)
class TurnSnapshot:
    """All models that could run a lane's next step."""

    runnable: tuple[Runnable, ...]
    max_batch_tokens: int
    neighbours: tuple[Runnable, ...] = ()
    """Models of other lanes that decode; they wait while a step of this one computes prompts. None if nobody
    who could run it has any."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A model that is being loaded, as the choice of its first step sees it."""

    has_work: bool
    is_readable: bool
    """Its first weights can be read, and its kernels are there."""
    has_stepped: bool
    """It has had its step of this load."""
    is_cancelled: bool
    is_lane_taken: bool
    """Another model's first step is on its way there, or a step is half launched."""
    others_decode: bool
    max_batch_tokens: int


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence that holds blocks."""

    rank: Rank
    num_blocks: int
    """Shared ones included."""
    seconds: float
    """To have its blocks again after it has given them up."""
    slack: float
    """Seconds until its next token is due."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a model holds of the device's memory, and on what terms it gives it up."""

    model: ModelId
    is_active: bool
    is_pinned: bool
    kv_slabs: int
    kv_floor: int
    kv_limit: int | None
    blocks_per_slab: int
    empty_slabs: int
    gatherable_slabs: int
    """Slabs that dropping the whole prefix cache would free, empty ones included."""
    num_free_blocks: int
    num_cached_blocks: int
    block_seconds: float
    """To have a block again that was dropped: to compute it, or to copy it to host memory and back."""
    reuse_chance: float
    """That the cached block which was used least recently is used again soon."""
    weight_slabs: int
    load_seconds: float
    return_chance: float
    """That a model without requests gets one soon."""
    active_since: float
    oldest_request: Rank | None
    """Its oldest request, waiting or running; None if it is idle."""
    running: tuple[Running, ...]
    """Oldest first."""


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """The device's pool and everybody's holdings."""

    num_retiring: int
    """Slabs on their way to the free list: they come without anybody giving up anything."""
    holdings: tuple[Holding, ...]
    unwanted_loads: tuple[ModelId, ...]
    """Models on their way in that nobody waits for any more."""
    min_residency: float
    """Seconds that a busy model keeps its weights before an older request of another may take them."""
    expected_demand: float = 0.0
    """Slabs that are going to be asked for soon, as far as the recent past tells."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a model wants beyond what is free."""

    model: ModelId
    slabs: int
    """For itself."""
    rank: Rank
    """Of the sequence that lacks memory, or of the oldest request that waits for weights."""
    for_weights: bool
    blocks: int = 0
    """Blocks of its own that would do as well; 0 for weights."""
    reserved: int = 0
    """Slabs that older requests of other models lack: they come first."""
    may_displace: bool = True
    """Others that have requests may be stopped for it."""
    is_again: bool = False
    """Of a sequence that has given way, and begins again with all that it had or not at all."""
    num_found: int = 0
    """Cached blocks of its own that it counts on."""
