"""The configuration: frozen values with defaults, checked as a whole before anything starts.

`examples/prism.yaml` shows every field with its default; a test keeps the two equal. Sizes are written
as numbers of bytes or as `512MiB`, durations as numbers of seconds or as `500ms`. `${env.NAME}` in any
string stands for an environment variable; where nothing else is in it, it may be a number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from prism.fields import READ_ENVIRONMENT, Duration, Real, Size, Whole
from prism.modes import RULES, Mode
from prism.tenants import ApiKey, ApiKeyConfig, key_problems, tenants_of
from prism.types import GiB, MiB, Quantization, Seconds, Slo, Tenant

GPU_WATCHDOG = Seconds(60.0)
"""Nothing that a GPU's worker does keeps its loop for more than a few seconds."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SloConfig(_Section):
    """Latency objectives of a model; a request may bring its own in x-slo-ttft-ms and x-slo-tpot-ms."""

    ttft: Duration = 2.0
    tpot: Duration = 0.2

    def slo(self) -> Slo:
        """The same as a wire value."""
        return Slo(self.ttft, self.tpot)


class ModelMemory(_Section):
    """KV memory of one model: `floor` is never taken from it, `limit` is never passed."""

    floor: Size = 0
    limit: Size | None = None

    @field_validator("limit")
    @classmethod
    def _ordered(cls, limit: int | None, info: ValidationInfo) -> int | None:
        if limit is not None and info.data.get("floor", 0) > limit:
            raise ValueError("floor is larger than limit")
        return limit


class ModelConfig(_Section):
    """One served model."""

    name: Name
    path: str
    """A Hugging Face model directory: config.json, safetensors, tokenizer.json."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """`dummy` needs no weights in the directory: it makes random ones of the shape that config.json tells."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    quantization: Quantization = "none"
    """`fp8` halves the layers' matrices when they are packed: one scale for each output channel."""
    max_model_len: Annotated[int, Strict(), Field(ge=1), READ_ENVIRONMENT] | None = None
    """Longest prompt plus output in tokens; the default is the model's own."""
    slo: SloConfig = SloConfig()
    memory: ModelMemory = ModelMemory()
    device: Annotated[int, Strict(), Field(ge=0), READ_ENVIRONMENT] | None = None
    """Place in `devices` of the one that the model lives on; by default chosen by size."""
    expected_load: Annotated[float, Strict(), Field(ge=0, le=1000), READ_ENVIRONMENT] | None = None
    """Seconds of a device that it will need each second, as far as is known before anybody asks.

    First homes go by it, and in mode static the parts of KV.
    """
    pinned: bool = False
    """Loaded at start and never evicted under pressure."""
    preload: bool = False
    """Loaded at start, evicted like any other."""

    @property
    def is_loaded_at_start(self) -> bool:
        """Pinned or not."""
        return self.pinned or self.preload


def likely_first(models: Iterable[ModelConfig]) -> list[ModelConfig]:
    """As things are done ahead for them: those that are loaded at start, then the others."""
    return sorted(models, key=lambda model: not model.is_loaded_at_start)


class DeviceConfig(_Section):
    """One device; one worker process serves it."""

    kind: Literal["cpu", "cuda"] = "cpu"
    index: Whole = Field(default=0, ge=0)
    memory: Size = 4 * GiB
    """Physical memory for weights, KV and workspaces of all models together."""
    slab: Size = Field(default=32 * MiB, validate_default=True)
    threads: Whole = Field(default=0, ge=0)
    """CPU threads for the mathematics; 0 takes all cores."""
    max_batch_tokens: Whole = Field(default=2048, ge=1, le=65536)
    """Most tokens of one step, prompts and decodes together."""
    max_batch_size: Whole = Field(default=256, ge=1, le=1024)
    """Most sequences of one step."""
    speed: Real = Field(default=1.0, ge=0.001, le=1000)
    """Of its steps, relative to the other devices; placement gives a faster one more."""
    lanes: Whole = Field(default=2, ge=1, le=8)
    """Steps of so many models at a time on a GPU; each lane has workspaces of its own. A CPU has one."""
    watchdog_timeout: Duration | None = None
    """A worker that has not reported for so long, though it lives, is killed and started again; its requests
    go on. None is 60 s for a GPU, and never for a CPU, where one step may take longer."""

    @property
    def watchdog_seconds(self) -> Seconds:
        """The same without None; infinite where nobody watches."""
        if self.watchdog_timeout is not None:
            return Seconds(self.watchdog_timeout)
        return GPU_WATCHDOG if self.kind == "cuda" else Seconds(math.inf)

    @field_validator("watchdog_timeout")
    @classmethod
    def _patient(cls, timeout: float | None) -> float | None:
        if timeout is not None and timeout < 10:
            raise ValueError("must be at least 10s: reports may come late")
        return timeout

    @field_validator("slab")
    @classmethod
    def _whole_slabs(cls, slab: int, info: ValidationInfo) -> int:
        if slab == 0 or slab & (slab - 1) or slab < 2 * MiB:
            raise ValueError("slab must be a power of two and at least 2MiB")
        if info.data.get("memory", 2 * slab) < 2 * slab:
            raise ValueError("memory must hold at least two slabs")
        return slab


class ServerConfig(_Section):
    """Addresses and limits of the HTTP side."""

    host: str = "127.0.0.1"
    port: Whole = Field(default=8000, ge=0, le=65535)
    admin_host: str = "127.0.0.1"
    admin_port: Whole = Field(default=8001, ge=0, le=65535)
    """Admin endpoints (`prism ps`, load, unload) are served here and nowhere else."""
    gateways: Whole = Field(default=1, ge=1, le=64)
    api_keys: tuple[ApiKey, ...] = ()
    """Accepted `Authorization: Bearer` keys with their tenants; empty accepts everybody."""
    max_body: Size = 16 * MiB
    shutdown_grace: Duration = 30.0
    """How long running streams may go on after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False

    @field_validator("api_keys")
    @classmethod
    def _consistent(cls, keys: tuple[ApiKeyConfig, ...]) -> tuple[ApiKeyConfig, ...]:
        if problems := key_problems(keys):
            raise ValueError("\n".join(problems))
        return keys

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """The tenant of each API key."""
        return tenants_of(self.api_keys)


class LimitsConfig(_Section):
    """Bounds on waiting. Nothing waits for ever."""

    max_queue: Whole = Field(default=1024, ge=1)
    """Waiting requests of one worker; one more is answered with 429, unless its tenant has few there."""
    max_wait: Duration = 60.0
    """Longest wait before the first token, activation included; then 429."""
    request_timeout: Duration = 600.0
    """Longest life of a request."""
    min_residency: Duration = 2.0
    """A busy model keeps its weights this long before an older request of another may take its memory."""


class SchedulingConfig(_Section):
    """Who gets a device and when, on which one models live, and when they move to another."""

    mode: Mode = Mode.PRISM
    """How models share a device; docs/design/scheduling.md."""
    quantum: Annotated[Duration, Field(gt=0)] = 10.0
    """In mode timeshare: a model takes requests for so long while others wait."""
    idle_threshold: Duration | None = None
    """A model without requests keeps its weights for so long, and is the first to give them from then on;
    None decides by how soon it came back before. The published system has 45 s."""
    load_ahead: bool = True
    """Mode prism: models come into free memory before anybody asks, and leave when somebody needs it."""
    placement_interval: Duration = 10.0
    """Between two looks at all models and devices; 0 moves nothing by itself."""
    demand_window: Annotated[Duration, Field(ge=1)] = 60.0
    """Over so long a time rates are taken."""
    migration_gain: Real = Field(default=0.1, ge=0.01, le=10)
    """A move must lower a device's pressure by more; 1 is a device that is full."""
    migration_cooldown: Duration = 120.0
    """Shortest time between two moves of a model; each one that soon follows doubles it."""
    max_migrations: Whole = Field(default=2, ge=0, le=64)
    """Most moves that one look starts."""
    drain_timeout: Duration = 60.0
    """A move's source finishes requests for so long; the rest goes on at the target."""
    profile: str | None = None
    """Costs of steps and loads that `prism profile` has measured; None derives them from models' shapes."""


class HostMemoryConfig(_Section):
    """Packed weights and KV in host memory."""

    budget: Size = 16 * GiB
    pack_ahead: bool = True
    """Models are packed before anybody asks, as far as budget and machine have room."""
    registered: Size | None = None
    """Most of it that each GPU's worker registers with CUDA, for fast loads; None is all, 0 nothing."""
    kv: Size = GiB
    """Most that each worker keeps of KV which lost its place on the device; 0 computes it again."""


class Config(_Section):
    """Everything that `prism serve` needs."""

    models: tuple[ModelConfig, ...] = Field(min_length=1)
    devices: tuple[DeviceConfig, ...] = Field(default=(DeviceConfig(),), min_length=1)
    server: ServerConfig = ServerConfig()
    limits: LimitsConfig = LimitsConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    host_memory: HostMemoryConfig = HostMemoryConfig()

    @field_validator("models")
    @classmethod
    def _unique_names(cls, models: tuple[ModelConfig, ...]) -> tuple[ModelConfig, ...]:
        names = [model.name for model in models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"names used twice: {', '.join(twice)}")
        return models

    @field_validator("devices")
    @classmethod
    def _unique_gpus(cls, devices: tuple[DeviceConfig, ...]) -> tuple[DeviceConfig, ...]:
        gpus = [device.index for device in devices if device.kind == "cuda"]
        if twice := sorted({index for index in gpus if gpus.count(index) > 1}):
            raise ValueError(f"GPUs used twice: {', '.join(map(str, twice))}")
        return devices

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        problems = []
        mode, rules = self.scheduling.mode, RULES[self.scheduling.mode]
        for index, model in enumerate(self.models):
            if model.device is not None and model.device >= len(self.devices):
                problems.append(f"models[{index}].device: there are {len(self.devices)} devices")
                continue
            homes = self.devices if model.device is None else (self.devices[model.device],)
            if model.device is None and len(self.devices) > 1 and rules.is_resident:
                problems.append(f"models[{index}].device: mode {mode} keeps it there, so it must be named")
            if model.pinned and rules.is_exclusive:
                problems.append(f"models[{index}].pinned: mode {mode} keeps no model on a device")
            if model.memory.limit is not None and rules.has_shares:
                problems.append(
                    f"models[{index}].memory.limit: mode {mode} gives each model a part of its own"
                )
            if model.memory.floor > max(device.memory for device in homes):
                problems.append(f"models[{index}].memory.floor: is more than the memory of its device")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def model(self, name: str) -> ModelConfig | None:
        """The model of that name."""
        return next((model for model in self.models if model.name == name), None)
