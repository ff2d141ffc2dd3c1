"""Everything that Prism's processes say to one another, as tagged unions (msgspec, MessagePack).

 gateway --Submit, CancelChoice--> worker     worker --Started, Outputs, Rejected, Returned--> gateway
 gateway --Demand--> controller                         controller --Routes--> gateway
 controller --Activate, Evict, SetLimits--> worker      worker --CommandDone--> controller
 controller --Abandon--> worker                         controller --Hung--> agent
 worker --Report--> controller, gateways                everyone --Hello, Ready--> agent
 agent --ProcessUp, ProcessEnded, Stop--> everyone      worker --WeightsWanted--> agent --Weights*--> worker

The agent is the authority on who is alive: it is the parent of every process and tells the others at
once when one has started or ended, so that nobody polls.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from prism.errors import WireError
from prism.types import FinishReason, ModelState, SamplingParams, Slo


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; the class name is the tag on the wire."""


class Role(StrEnum):
    """What a process is."""

    GATEWAY = "gateway"
    CONTROLLER = "controller"
    WORKER = "worker"


# --- gateway and worker ----------------------------------------------------------------------------


class ResumedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What a choice had produced before its worker died; never part of the prompt."""

    choice: int
    token_ids: list[int]
    finished: bool


class Submit(Message, frozen=True, kw_only=True):
    """Run a request. `attempt` grows with each resubmission; answers of earlier ones are void."""

    request_id: str
    attempt: int
    model: str
    prompt: list[int]
    params: SamplingParams
    slo: Slo
    arrival: float
    """Unix time in seconds at which the gateway had read the request."""
    latest_end: float
    """Unix time at which the worker gives the request up."""
    resumed: list[ResumedChoice] = []
    clip_max_tokens: bool = False
    """max_tokens is a default, so it shrinks to what the worker's memory can hold; else that is an error."""
    alone: bool = False
    """The request is suspected of killing workers: nothing else may run beside it."""
    tenant: str | None = None
    """Whose it is; None where no API keys are configured."""
    weight: float = 1.0
    """Of the tenant, when several wait."""


class CancelChoice(Message, frozen=True, kw_only=True):
    """Stop a choice, or all of them (`choice` None). A request that is unknown is no error."""

    request_id: str
    attempt: int
    choice: int | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a drawn token and of the likeliest ones, before temperature and filters."""

    logprob: float
    top: list[tuple[int, float]]
    """(token id, log-probability), most likely first; as many as were asked for."""


class Token(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One new token of a choice about which there is nothing else to say; `index` as in `Output`."""

    request_id: str
    attempt: int
    choice: int
    index: int
    token: int


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one choice. `index` is the place of the first one among the choice's output tokens.

    A token that ended the choice (end of sequence, stop_token_ids) is in `stop_token`, not in
    `token_ids`; it counts as one completion token.
    """

    request_id: str
    attempt: int
    choice: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None


class Started(Message, frozen=True, kw_only=True):
    """A request runs for the first time in this attempt: from here on it is a suspect if the worker dies."""

    request_id: str
    attempt: int
    incarnation: int
    queue_seconds: float
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    queue_position: int = 0
    """Its place among those that waited when it came, from 1; 0 if it was not estimated."""
    estimated_seconds: float = 0.0
    """When it came, it was expected to wait so long."""


class Outputs(Message, frozen=True, kw_only=True):
    """All new tokens of one step that belong to one gateway.

    Hundreds in a step, most of them of streams that just go on: those are `tokens`, which take a fifth of the
    time to make and to encode.
    """

    incarnation: int
    tokens: list[Token] = []
    items: list[Output] = []
    """Those with log-probabilities or an end."""


class Rejected(Message, frozen=True, kw_only=True):
    """A request ended without its last token."""

    request_id: str
    attempt: int
    incarnation: int
    error: WireError


class Returned(Message, frozen=True, kw_only=True):
    """The worker will not finish this request, though nothing is wrong: another one is to go on with it."""

    request_id: str
    attempt: int
    incarnation: int


# --- everyone and the agent ------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """First message on every connection: who is calling."""

    role: Role
    name: str
    incarnation: int = 0


class ProcessUp(Message, frozen=True, kw_only=True):
    """A process does its work: it has said Ready. `address` is where it listens, if it does."""

    role: Role
    name: str
    incarnation: int
    address: str | None = None


class ProcessEnded(Message, frozen=True, kw_only=True):
    """A process has ended, well or not."""

    role: Role
    name: str
    incarnation: int


class Ready(Message, frozen=True, kw_only=True):
    """A child tells the agent that it listens at `address` and does its work."""

    role: Role
    name: str
    incarnation: int
    address: str | None = None


class Stop(Message, frozen=True, kw_only=True):
    """Refuse new work, finish what runs within `grace` seconds, then exit."""

    grace: float


class Hung(Message, frozen=True, kw_only=True):
    """Nothing was heard of this worker for longer than its `watchdog_timeout`: it is to be killed."""

    name: str
    incarnation: int
    silent_seconds: float


class WeightsWanted(Message, frozen=True, kw_only=True):
    """A worker needs a model's packed weights in host memory."""

    model: str


class WeightsProgress(Message, frozen=True, kw_only=True):
    """Packing goes on."""

    model: str
    done_bytes: int
    total_bytes: int


class WeightsReady(Message, frozen=True, kw_only=True):
    """The packed weights can be fetched as a file descriptor from the store's socket."""

    model: str
    total_bytes: int


class WeightsHeld(Message, frozen=True, kw_only=True):
    """Packed weights are in host memory: told to all workers when they are packed or asked for.

    Gateways hear it of models whose packing had failed.
    """

    model: str
    total_bytes: int


class WeightsFailed(Message, frozen=True, kw_only=True):
    """The checkpoint cannot be packed; `reason` names file and tensor. For gateways, and who has asked."""

    model: str
    reason: str


# --- controller, workers and gateways --------------------------------------------------------------


WAITS = tuple(0.001 * 2**power for power in range(12))
"""Seconds that a request may have to wait for the end of another model's step."""


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """One model as its worker sees it. Sizes in bytes."""

    model: str
    state: ModelState
    weights_bytes: int
    kv_used_bytes: int
    kv_cached_bytes: int
    """Prefix-cache blocks that no sequence uses: reclaimable."""
    kv_slab_bytes: int
    kv_floor_bytes: int
    kv_limit_bytes: int | None
    num_running: int
    num_waiting: int
    load_progress: float
    idle_seconds: float
    num_activations: int
    max_len: int | None
    """Longest context in tokens that the model and its memory limit allow; None while unknown."""
    pinned: bool
    is_ahead: bool = False
    """It is in memory though nobody has asked for it: it reserves nothing."""
    is_sent_away: bool = False
    """An administrator has unloaded it, and nobody has asked for it since."""
    error: str | None = None
    registered_bytes: int = 0
    """Packed weights in host memory from which this worker can load at full speed."""
    kv_host_bytes: int = 0
    """Blocks that wait in host memory for when they are wanted again."""
    estimated_wait: float = 0.0
    """Seconds until a request that came now would start, as far as is known."""
    load_seconds: float = 0.0
    """How long its last activation took; 0 if there was none."""
    num_started: int = 0
    """Requests that started. This and all below count from the worker's start."""
    prompt_tokens: int = 0
    """Theirs."""
    decoded_tokens: int = 0
    device_seconds: float = 0.0
    """The part of the device's time that its steps had."""
    needed_seconds: float = 0.0
    """What of it the objectives asked for."""
    num_late: int = 0
    """Requests that found the model in memory, and whose first token was late though alone it would not."""
    blocked_seconds: list[float] = []
    """How long who came had to wait longer than each of `WAITS` for the end of a step."""


class TenantReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant has of a worker; the last three count from the worker's start."""

    tenant: str
    weight: float
    num_running: int
    num_waiting: int
    prompt_tokens: int
    """Computed: without what the prefix cache had."""
    decoded_tokens: int
    device_seconds: float
    """By the cost model."""


class Report(Message, frozen=True, kw_only=True):
    """A worker's state, sent to controller and gateways at every change of a state and twice a second."""

    worker: str
    device: str
    incarnation: int
    epoch: int
    slab_bytes: int
    num_slabs: int
    num_free_slabs: int
    models: list[ModelReport]
    registered_bytes: int = 0
    """Host memory that is registered with the device."""
    registration_error: str | None = None
    """Why some of it could not be registered: loads are slower."""
    kv_host_bytes: int = 0
    """Host memory taken for KV."""
    tenants: list[TenantReport] = []
    """Those of the configured API keys."""
    kv_host_error: str | None = None
    """Why no more of it could be taken: what has no place there is computed again."""


class Demand(Message, frozen=True, kw_only=True):
    """A gateway holds a request for a model that has no route."""

    model: str


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Requests for `model` go to any of `workers`, which activate it when they must."""

    model: str
    workers: list[str]
    weights: list[float] = []
    """How much load each of them bears; empty if all bear the same."""
    draining: list[str] = []
    """Workers that finish what they have, and get more only when no other is up."""


class Routes(Message, frozen=True, kw_only=True):
    """The whole routing table; a higher (epoch, version) replaces a lower one."""

    epoch: int
    version: int
    routes: list[Route]
    silent: list[str] = []
    """Workers that are up and have not reported for long."""


class Command(Message, frozen=True, kw_only=True):
    """Base of what the controller tells workers; a worker ignores epochs below the highest seen."""

    epoch: int
    command_id: int


class Activate(Command, frozen=True, kw_only=True):
    """Load a model now; `pinned` models are never evicted under pressure."""

    model: str
    pinned: bool | None = None


class Evict(Command, frozen=True, kw_only=True):
    """Give up a model's weights. While it has unfinished requests that is refused, or they are `Returned`."""

    model: str
    returns: bool = False
    moved: bool = False
    """It lives elsewhere: it is pinned here no more."""


class SetLimits(Command, frozen=True, kw_only=True):
    """Change a model's KV floor and limit, in bytes."""

    model: str
    kv_floor_bytes: int
    kv_limit_bytes: int | None


class Abandon(Command, frozen=True, kw_only=True):
    """The controller waits for the `Activate` of this number no more: nothing of it stays in force."""


class Homes(Message, frozen=True, kw_only=True):
    """The models that live at a worker: those that it may load before anybody asks."""

    epoch: int
    models: list[str]


class CommandDone(Message, frozen=True, kw_only=True):
    """The command was carried out, or `error` says why not."""

    command_id: int
    worker: str
    error: str | None = None
    conflicts: bool = False
    """It is no failure: something else that is under way, or the mode, does not let it be."""
    without_room: list[str] = []
    """Models that cannot be loaded any more beside the one that the command has pinned."""


ToWorker = Submit | CancelChoice | Hello | Activate | Evict | SetLimits | Abandon | Homes
FromWorker = Started | Outputs | Rejected | Returned | Report | CommandDone
ToAgent = Hello | Ready | Hung | WeightsWanted
FromAgent = ProcessUp | ProcessEnded | Stop | WeightsProgress | WeightsReady | WeightsHeld | WeightsFailed
ToController = Hello | Demand
FromController = Routes

AnyMessage = ToWorker | FromWorker | ToAgent | FromAgent | ToController | FromController

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> AnyMessage:
    """The message in `data`; raises `msgspec.DecodeError` if it is none."""
    return _decoder.decode(data)
