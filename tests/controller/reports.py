"""What workers say of themselves."""

from __future__ import annotations

from typing import Any

from prism.messages import ModelReport, Report
from prism.types import ModelState


def model_report(model: str, **fields: Any) -> ModelReport:
    values: dict[str, Any] = {
        "state": ModelState.COLD,
        "weights_bytes": 0,
        "kv_used_bytes": 0,
        "kv_cached_bytes": 0,
        "kv_slab_bytes": 0,
        "kv_floor_bytes": 0,
        "kv_limit_bytes": None,
        "num_running": 0,
        "num_waiting": 0,
        "load_progress": 0.0,
        "idle_seconds": 0.0,
        "num_activations": 0,
        "max_len": None,
        "pinned": False,
    }
    return ModelReport(model=model, **values | fields)


def report(
    worker: str, *models: ModelReport, incarnation: int = 1, num_free_slabs: int = 8, **fields: Any
) -> Report:
    return Report(
        worker=worker,
        device="cpu:0",
        incarnation=incarnation,
        epoch=1,
        slab_bytes=2**21,
        num_slabs=8,
        num_free_slabs=num_free_slabs,
        models=list(models),
        **fields,
    )
