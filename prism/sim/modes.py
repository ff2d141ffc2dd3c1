"""Limits of simulated devices."""

from __future__ import annotations

from dataclasses import dataclass


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
    horizon: float = 0.1
    """Seconds of prompts that engines may hold when requests go by deadlines."""
    quantum: float = 10.0
    """Seconds that a model may take requests in `timeshare` while others wait."""
    is_stepping: bool = False
    """Step one by one instead of many at once; the results are the same."""
