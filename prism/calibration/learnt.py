"""A profile with the costs that a running server has measured, from its metrics and its own profile. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from prism.costs import Corrections
from prism.errors import ConfigError
from prism.profile import Load, ModelProfile, Profile

KINDS = ("decode", "prompt", "load")
ENOUGH = {"decode": 20, "prompt": 20, "load": 3}
"""Of a model; fewer tell nothing of it by themselves."""
LEAST_FACTOR, MOST_FACTOR = 0.2, 5.0
"""Beyond these a profile hardly was of this device, or the device was not the server's own."""
MOST_COUNTED = 1e12
"""Steps, or seconds."""
SAMPLES = {
    "prism:work_alone_total": "count",
    "prism:work_alone_seconds_total": "seconds",
    "prism:work_alone_predicted_seconds_total": "predicted",
}


class Key(NamedTuple):
    """Whose work was counted: a model's, of one kind, with costs of this digest."""

    model: str
    kind: str
    costs: str


@dataclass(frozen=True, slots=True)
class Seen:
    """Work that had the device, or the link, to itself."""

    count: int = 0
    seconds: float = 0.0
    predicted: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times what was predicted it took; 0 if that cannot be told."""
        return self.seconds / self.predicted if self.predicted > 0 else 0.0

    def plus(self, other: Seen, sign: int = 1) -> Seen:
        """Both together; with -1 this one without the other."""
        return Seen(
            self.count + sign * other.count,
            self.seconds + sign * other.seconds,
            self.predicted + sign * other.predicted,
        )


Counts = Mapping[Key, Seen]


class Factor(NamedTuple):
    """By which a model's costs of one kind are multiplied."""

    seen: Seen
    """Of the model."""
    value: float
    origin: Literal["model", "all", "none"]
    """Whose work it is from: too few of a model's own, and all models' counts, if that is enough."""

    @property
    def is_wild(self) -> bool:
        """It is hardly to be believed."""
        return not LEAST_FACTOR <= self.value <= MOST_FACTOR


class Learnt(NamedTuple):
    """The new profile, and what has become other in it."""

    profile: Profile
    factors: Mapping[tuple[str, str], Factor]
    """By model and kind."""


def read_counts(text: str, source: str) -> Counts:
    """From Prometheus' text. Raises `ConfigError` if there is nothing that could be compared."""
    found: dict[Key, dict[str, float]] = {}
    has_steps = is_prism = False
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                is_prism = is_prism or sample.name.startswith("prism:")
                has_steps = has_steps or sample.name == "prism:steps_total"
                labels = sample.labels
                if (field := SAMPLES.get(sample.name)) is not None and labels["kind"] in KINDS:
                    key = Key(labels["model_name"], labels["kind"], labels["costs"])
                    if not 0 <= sample.value < MOST_COUNTED:
                        raise ConfigError([f"{source}: {sample.name} of {key.model} is {sample.value}"])
                    found.setdefault(key, {})[field] = sample.value
    except (ValueError, KeyError) as error:
        raise ConfigError([f"{source}: these are no metrics of Prism: {error}"]) from None
    if not is_prism:
        raise ConfigError([f"{source}: these are no metrics of Prism"])
    if not found:
        reason = "its configuration has no scheduling.profile, or one that knows none of the models that ran"
        raise ConfigError([f"{source}: {reason if has_steps else 'no model has run yet'}"])
    return {
        key: Seen(int(each.get("count", 0)), each.get("seconds", 0.0), each.get("predicted", 0.0))
        for key, each in found.items()
    }


def added(before: Counts, after: Counts, source: str) -> Counts:
    """What came between two looks. Raises `ConfigError` if the server was started anew in between."""
    result = {key: now.plus(before.get(key, Seen()), -1) for key, now in after.items()}
    if any(each.count < 0 for each in result.values()) or set(before) - set(after):
        raise ConfigError([f"{source}: the server was started anew meanwhile"])
    return result


def learn(base: Profile, counts: Counts, name: str, source: str, period: str) -> Learnt:
    """The profile `base`, of this name, as a server measured it that has it; `period` says when.

    Raises `ConfigError` if the server has another profile, or too little has run.
    """
    seen = _comparable(base, counts, name, source)
    together = {kind: Seen() for kind in KINDS}
    for (_, kind), each in seen.items():
        together[kind] = together[kind].plus(each)
    if not any(_is_enough(kind, together[kind]) for kind in ("decode", "prompt")):
        runs = ", ".join(f"{together[kind].count} {kind}" for kind in KINDS)
        raise ConfigError(
            [f"{source}: too little has run {period} ({runs}); {ENOUGH['decode']} steps of a kind are needed"]
        )
    factors = {
        (model, kind): _factor(kind, seen.get((model, kind), Seen()), together[kind])
        for model in base.models
        for kind in KINDS
    }
    models = {
        model: _scaled(entry, *(factors[model, kind].value for kind in KINDS))
        for model, entry in base.models.items()
    }
    note = _note(base, together, factors, name, source, period)
    return Learnt(msgspec.structs.replace(base, models=models, note=note), factors)


def _comparable(base: Profile, counts: Counts, name: str, source: str) -> dict[tuple[str, str], Seen]:
    """By model and kind, what was predicted by the base's costs.

    What a worker counted that had another profile, before it was started again, is left out.
    """
    problems = []
    for model in sorted({key.model for key in counts}):
        digests = {key.costs for key in counts if key.model == model}
        if model not in base.models:
            problems.append(f"{name}: has no model {model}, which the server at {source} has a profile of")
        elif base.costs(model).digest not in digests:
            problems.append(f"{name}: has other costs of {model} than the profile of the server at {source}")
    if problems:
        raise ConfigError(problems)
    return {
        (key.model, key.kind): seen
        for key, seen in counts.items()
        if key.costs == base.costs(key.model).digest
    }


def _is_enough(kind: str, seen: Seen) -> bool:
    return seen.count >= ENOUGH[kind] and 0 < seen.ratio < MOST_COUNTED


def _factor(kind: str, own: Seen, together: Seen) -> Factor:
    if _is_enough(kind, own):
        return Factor(own, own.ratio, "model")
    if _is_enough(kind, together):
        return Factor(own, together.ratio, "all")
    return Factor(own, 1.0, "none")


def _scaled(entry: ModelProfile, decode: float, prompt: float, load: float) -> ModelProfile:
    """A worker corrects its costs in the same way."""
    costs = Corrections(decode, prompt, load).apply(entry.costs())
    return msgspec.structs.replace(
        entry,
        knots=costs.steps.knots,
        prompt_knots=costs.steps.prompt_curve,
        per_pair=costs.steps.per_pair,
        per_context=costs.steps.per_context,
        load=Load(costs.loads.fixed, costs.loads.bandwidth),
    )


def _note(
    base: Profile,
    together: Mapping[str, Seen],
    factors: Mapping[tuple[str, str], Factor],
    name: str,
    source: str,
    period: str,
) -> str:
    parts = ", ".join(
        f"{each.count} {kind} ({each.ratio:.2f} times)" for kind, each in together.items() if each.count
    )
    wild = [f"{model} {kind}" for (model, kind), factor in factors.items() if factor.is_wild]
    doubt = f" Hardly to be believed: {', '.join(wild)}." if wild else ""
    before = f" Before: {base.note}" if base.note else ""
    return f"{name} as the server at {source} measured it {period}: {parts}.{doubt}{before}"
