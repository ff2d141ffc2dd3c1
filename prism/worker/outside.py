"""What a worker's loop reaches beside its device: other processes, threads, the clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism.weights.link import Link
from prism.weights.registrations import Registrations
from prism.worker.host_chunks import Chunks
from prism.worker.loading import Fetch, Jobs
from prism.worker.outbox import Outbox


@dataclass(frozen=True, slots=True)
class Outside:
    """Nothing of it makes the loop wait."""

    outbox: Outbox
    jobs: Jobs
    fetch: Fetch
    """Packed weights, from the agent's store."""
    link: Link
    clock: Callable[[], float]
    registrations: Registrations | None = None
    """Packed weights that are registered with the device, where it gains by that."""
    chunks: Chunks | None = None
    """Host memory for KV, if there is any."""
