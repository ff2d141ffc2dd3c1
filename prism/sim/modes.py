"""Limits of simulated devices."""

from __future__ import annotations

from dataclasses import dataclass

from prism.config import Config


@dataclass(frozen=True, slots=True)
class Limits:
    """Of every device; the server's defaults."""

    slab_bytes: int = 32 << 20
    num_lanes: int = 2
    max_batch_tokens: int = 2048
    max_batch_size: int = 256
    max_wait: float = 60.0
    request_timeout: float = 600.0
    min_residency: float = 2.0
    idle_threshold: float | None = None
    """As `scheduling.idle_threshold`."""
    load_ahead: bool = True
    """As `scheduling.load_ahead`."""
    horizon: float = 0.1
    """Seconds of prompts that engines may hold when requests go by deadlines."""
    quantum: float = 10.0
    """Seconds that a model may take requests in `timeshare` while others wait."""
    is_queueing: bool = True
    """A lane's next step is chosen when its present one is about to end, as on GPUs; else when it has run."""
    is_stepping: bool = False
    """Step one by one instead of many at once; the results are the same."""


def limits_of(config: Config, *, is_stepping: bool) -> Limits:
    """Those of a server's configuration; all simulated devices are like the first of its devices."""
    device, limits, scheduling = config.devices[0], config.limits, config.scheduling
    return Limits(
        slab_bytes=device.slab,
        num_lanes=device.lanes if device.kind == "cuda" else 1,
        max_batch_tokens=device.max_batch_tokens,
        max_batch_size=device.max_batch_size,
        max_wait=limits.max_wait,
        request_timeout=limits.request_timeout,
        min_residency=limits.min_residency,
        idle_threshold=scheduling.idle_threshold,
        load_ahead=scheduling.load_ahead,
        quantum=scheduling.quantum,
        is_queueing=device.kind == "cuda",
        is_stepping=is_stepping,
    )
