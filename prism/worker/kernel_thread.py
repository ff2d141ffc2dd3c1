"""Has what models' steps need built and loaded while nobody has asked for them yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from prism.config import ModelConfig, likely_first
from prism.errors import PrismError
from prism.modelspec import ModelSpec
from prism.worker.device import Backend
from prism.worker.models import configured_spec

log = logging.getLogger(__name__)

CLOSING_SECONDS = 1.0
"""A kernel that is being built on a machine's first start is not waited for."""


class KernelThread:
    """Goes through the models once, likely ones first. What it has not come to is loaded with its model."""

    def __init__(self, backend: Backend, models: Sequence[ModelConfig]) -> None:
        self._backend = backend
        self._models = likely_first(models)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._is_closing = True
        self._thread.join(CLOSING_SECONDS)

    def _run(self) -> None:
        specs, begin = _specs(self._models), time.monotonic()
        for spec in specs:
            try:
                for _ in self._backend.prepare_ahead(spec):
                    if self._is_closing:
                        return
            except Exception:  # it is tried again with the model, whose load fails if this does
                log.exception("the kernels of a %s model could not be loaded ahead", spec.family)
        seconds = time.monotonic() - begin
        log.debug("kernels of %d kinds of models were loaded ahead in %.1f s", len(specs), seconds)


def _specs(models: Sequence[ModelConfig]) -> list[ModelSpec]:
    """Each once; a checkpoint that cannot be read is told of when it is loaded."""
    specs: list[ModelSpec] = []
    for model in models:
        try:
            spec = configured_spec(model)
        except PrismError:
            continue
        if spec not in specs:
            specs.append(spec)
    return specs
