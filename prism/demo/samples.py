"""What the admin endpoint said over time, and what follows from it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ModelSample:
    """One model at one moment, in slabs."""

    name: str
    state: str
    weights: int
    kv: int
    kv_used: float
    kv_cached: float
    cached_bytes: int
    num_requests: int
    num_activations: int

    @property
    def is_idle(self) -> bool:
        """Loaded, and nobody asks it anything."""
        return self.state == "active" and self.num_requests == 0

    @property
    def slabs(self) -> int:
        """All that it holds."""
        return self.weights + self.kv


@dataclass(frozen=True)
class Sample:
    """The device at one moment."""

    incarnation: int
    num_slabs: int
    num_free: int
    models: tuple[ModelSample, ...]

    def model(self, name: str) -> ModelSample:
        """One of its models."""
        return next(model for model in self.models if model.name == name)


class Reclaim(NamedTuple):
    """A loaded, idle model gave up cached KV while others grew."""

    model: str
    slabs: int
    takers: tuple[str, ...]


def read_sample(answer: dict[str, Any]) -> Sample | None:
    """A sample from the answer of /admin/models; None while the worker is away."""
    if not answer["devices"]:
        return None
    device = answer["devices"][0]
    models = [(entry["model"], entry["report"]) for entry in answer["models"]]
    if any(report is None for _, report in models):
        return None
    slab = device["slab_bytes"]
    return Sample(
        device["incarnation"],
        device["num_slabs"],
        device["num_free_slabs"],
        tuple(_model(name, report, slab) for name, report in models),
    )


def _model(name: str, report: dict[str, Any], slab: int) -> ModelSample:
    return ModelSample(
        name=name,
        state=report["state"],
        weights=report["weights_bytes"] // slab,
        kv=report["kv_slab_bytes"] // slab,
        kv_used=report["kv_used_bytes"] / slab,
        kv_cached=report["kv_cached_bytes"] / slab,
        cached_bytes=report["kv_cached_bytes"],
        num_requests=report["num_running"] + report["num_waiting"],
        num_activations=report["num_activations"],
    )


def activations(samples: Sequence[Sample]) -> Counter[str]:
    """How often each model was loaded."""
    return Counter({model.name: model.num_activations for model in samples[-1].models})


def evictions(samples: Sequence[Sample]) -> Counter[str]:
    """How often each model lost its memory: every load but the first follows one, and so does being cold."""
    found: Counter[str] = Counter()
    for model in samples[-1].models:
        found[model.name] = max(0, model.num_activations - (model.state == "active"))
    return found


def reclaims(samples: Sequence[Sample]) -> Iterator[Reclaim]:
    """Where memory moved between models that both stayed: only a neighbour's need shrinks an idle cache."""
    for before, after in pairwise(samples):
        for old, new in zip(before.models, after.models, strict=True):
            stayed = old.is_idle and new.is_idle and old.num_activations == new.num_activations
            if stayed and new.kv < old.kv and new.cached_bytes < old.cached_bytes:
                takers = _grown(before, after)
                if takers:
                    yield Reclaim(old.name, old.kv - new.kv, takers)


def _grown(before: Sample, after: Sample) -> tuple[str, ...]:
    pairs = zip(before.models, after.models, strict=True)
    return tuple(new.name for old, new in pairs if new.slabs > old.slabs)


def slabs_passed(samples: Sequence[Sample]) -> int:
    """Slabs that went from one model to another between two samples: what some lost and others got."""
    return sum(_passed(before, after) for before, after in pairwise(samples))


def _passed(before: Sample, after: Sample) -> int:
    changes = [new.slabs - old.slabs for old, new in zip(before.models, after.models, strict=True)]
    return min(sum(change for change in changes if change > 0), -sum(c for c in changes if c < 0))


def restarts(samples: Sequence[Sample]) -> int:
    """How often the worker was started again."""
    return sum(before.incarnation != after.incarnation for before, after in pairwise(samples))
