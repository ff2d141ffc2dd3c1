"""The error tree. A `RequestError` carries its HTTP status and OpenAI's `type`, `code` and `param`.

PrismError
├── ConfigError            every problem of a configuration at once
├── DriverError            a memory driver's call failed
├── OutOfSlabs             the pool holds fewer free slabs than asked for
├── DeviceTooSmall         a model that the device, as it was opened, can never serve
├── NoRoom                 a model that does not fit beside those that are pinned
├── CheckpointError        a model directory that cannot be used, naming file and tensor
├── HostMemoryError        host memory for packed weights could not be reserved
│   └── NotHeld            the store has let the weights go meanwhile
└── RequestError           one request failed; the rest go on
    ├── InvalidRequest         400  a field is wrong, unknown or unsupported (`param` names it)
    ├── ContextLengthExceeded  400  prompt and output cannot fit the model or its memory limit
    ├── Unauthorized           401
    ├── ModelNotFound          404
    ├── Conflict               409  the model's state does not allow it now
    ├── BodyTooLarge           413
    ├── Overloaded             429  with a computed Retry-After
    ├── EngineFailure          500  the request kept failing
    └── Unavailable            503  with Retry-After: shutting down, or the model cannot be loaded now
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class PrismError(Exception):
    """Base of everything that Prism raises on purpose."""


class ProcessDied(PrismError):
    """One of several processes that share a piece of work has been killed."""


class ConfigError(PrismError):
    """A configuration that cannot be used; `problems` lists all of it, one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        """As it was made: processes that simulate send it to their parent."""
        return type(self), (self.problems,)


class DriverError(PrismError):
    """A call of a memory driver failed; `call` is its name, `code` what the system or CUDA returned."""

    def __init__(self, call: str, code: int | str) -> None:
        super().__init__(f"{call} failed: {code}")
        self.call = call
        self.code = code


class StillMapped(DriverError):
    """Mapping failed half way, and so did its roll-back: the first `num_handles` are still mapped."""

    def __init__(self, error: DriverError, num_handles: int) -> None:
        super().__init__(error.call, error.code)
        self.num_handles = num_handles


class OutOfSlabs(PrismError):
    """The pool has fewer free slabs than were asked for; nothing was taken."""

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} slabs wanted, {free} free")
        self.wanted = wanted
        self.free = free


class DeviceTooSmall(PrismError):
    """The device, with the memory and the tables that it was opened with, can never serve the model."""


class NoRoom(PrismError):
    """Pinned models leave a model less than it takes to load it."""


class CheckpointError(PrismError):
    """A model directory is corrupt, truncated or unsupported."""

    def __init__(self, message: str, *, file: str, tensor: str | None = None) -> None:
        place = file if tensor is None else f"{file}: {tensor}"
        super().__init__(f"{place}: {message}")
        self.message = message
        self.file = file
        self.tensor = tensor


class HostMemoryError(PrismError):
    """Host memory for packed weights could not be reserved."""


class NotHeld(HostMemoryError):
    """The weight store does not hold the model (any more): asking for it again packs it."""


class WireError(msgspec.Struct, frozen=True, kw_only=True):
    """A `RequestError` as it travels between processes."""

    status: int
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None


class RequestError(PrismError):
    """One request failed. Subclasses fix the HTTP status and OpenAI's error type."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def wire(self) -> WireError:
        """This error as a message field."""
        return WireError(
            status=self.status,
            type=self.type,
            message=self.message,
            param=self.param,
            code=self.code,
            retry_after=self.retry_after,
        )


class InvalidRequest(RequestError):
    """A field is malformed, unknown or unsupported; `param` names it."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthExceeded(RequestError):
    """The prompt, or prompt and output together, can never fit."""

    status = 400
    type = "invalid_request_error"
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    """No API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class ModelNotFound(RequestError):
    """No model of that name is configured."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Conflict(RequestError):
    """What is asked of a model cannot be done in the state that it is in."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"


class BodyTooLarge(RequestError):
    """The request's body passes the configured limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Overloaded(RequestError):
    """A queue is full, or the request waited for as long as it may; `retry_after` is in seconds."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"


class EngineFailure(RequestError):
    """The request failed inside the engine, again and again if that could help."""

    status = 500
    type = "server_error"
    code = "engine_failure"


class Unavailable(RequestError):
    """Not now: the server is stopping, or the model cannot be loaded."""

    status = 503
    type = "server_error"
    code = "unavailable"
