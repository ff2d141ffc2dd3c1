"""Identities, units and small value types that every part of Prism shares.

Identities are `NewType`s so that a model's name cannot be passed where a request's is meant. Sizes are
in bytes and times in seconds unless a name says otherwise. Nothing here has behaviour.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple, NewType

import msgspec

ModelId = NewType("ModelId", str)
RequestId = NewType("RequestId", str)
Rank = tuple[float, RequestId, int]
"""Arrival, request, choice: who is older has the smaller one. No two sequences share one."""
LAST_RANK: Rank = (float("inf"), RequestId(""), 0)
"""Of what no request asks for."""
WorkerId = NewType("WorkerId", str)
GatewayId = NewType("GatewayId", str)
TenantId = NewType("TenantId", str)
LaneId = NewType("LaneId", int)
SlabId = NewType("SlabId", int)
BlockId = NewType("BlockId", int)
"""A KV block's place: its byte offset in the window divided by its model's unit (see engine/kv_layout)."""
TokenId = NewType("TokenId", int)

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)
Address = NewType("Address", int)
Epoch = NewType("Epoch", int)
"""Grows with every controller that takes office; a worker obeys only the highest one it has seen."""
Incarnation = NewType("Incarnation", int)
"""Grows with every start of one worker; what an earlier incarnation said is void."""

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB


class Stamp(NamedTuple):
    """The last queued step of a lane that may still read or write something that was freed."""

    lane: LaneId
    step: int


class Tenant(NamedTuple):
    """Who sends requests with one or several API keys."""

    name: TenantId
    weight: float
    part: float
    """Its weight of those of all configured tenants together."""


class FinishReason(StrEnum):
    """Why a choice ended well; the values are OpenAI's."""

    STOP = "stop"
    LENGTH = "length"


class ModelState(StrEnum):
    """Where a model is, seen from one worker."""

    COLD = "cold"
    FETCHING = "fetching"  # waiting for its packed weights in host memory
    LOADING = "loading"  # slabs taken, bytes on their way to the device
    ACTIVE = "active"
    EVICTING = "evicting"  # its memory is on the way back to the pool
    FAILED = "failed"  # the last load failed; requests are refused with its reason until it is loaded again


class DType(StrEnum):
    """Number formats by their safetensors names. `F8` is that of quantised weights only."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"
    F8 = "F8_E4M3"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        match self:
            case DType.F32:
                return 4
            case DType.F8:
                return 1
            case DType.BF16 | DType.F16:
                return 2


Quantization = Literal["none", "fp8"]
"""What a model's linear weights are converted to when they are packed."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen. Every field has been validated by the gateway.

    Stop strings are absent on purpose: text belongs to the gateway, which cancels a choice at its stop.
    """

    n: int = 1
    max_tokens: int
    """Most output tokens of a choice, resumed ones included."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is drawn before this many output tokens."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    """Number of alternatives reported with each token; None reports no log-probabilities at all."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a choice, the model's end-of-sequence tokens included unless they are ignored."""
    seed: int
    """A draw depends on (seed, choice, position) alone; the gateway picks one when the client gives none."""


class Slo(msgspec.Struct, frozen=True):
    """Latency objectives of a request, in seconds."""

    ttft: float
    """Arrival to first token."""
    tpot: float
    """Between two tokens of one choice."""
