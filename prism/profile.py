"""The profile of a device: what steps and loads cost on it, as measured, in a JSON file.

    {"version": 1,
     "device": {"name": "...", "memory_bytes": 150000000000,
                "rates": {"flops": 7.9e14, "bandwidth": 4.2e12, "link": 4.5e10, "launch": 2.5e-5},
                "overlap": {"2": 1.22}},
     "models": {"llama-3-8b": {"shape": {...}, "knots": [[1, 0.0038], [64, 0.0039]],
                               "prompt_knots": [[16, 0.0051], [512, 0.0124]],
                               "per_pair": 0.0, "per_context": 3.1e-8,
                               "load": {"fixed": 0.01, "bandwidth": 4.5e10}}}}

`prism profile` writes it, the worker and the simulator read it. Strict: an unknown, missing or impossible
field is an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from prism.costs import Costs, DeviceRates, LoadCosts, Shape, from_shape, measured
from prism.errors import ConfigError
from prism.types import Bytes, Seconds

VERSION = 1

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See `costs.DeviceRates`."""

    flops: Positive
    bandwidth: Positive
    link: Positive
    launch: NotNegative

    def rates(self) -> DeviceRates:
        """The same as the cost model takes it."""
        return DeviceRates(self.flops, self.bandwidth, self.link, Seconds(self.launch))


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The device itself."""

    name: str
    memory_bytes: Count
    rates: Rates
    overlap: dict[Annotated[int, Meta(ge=2)], Annotated[float, Meta(ge=1)]] = {}
    """Lanes that decode side by side: how much more they do together than one lane does."""


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See `costs.Shape`."""

    num_parameters: Positive
    weight_bytes: Count
    read_bytes: Count
    kv_bytes_per_token: Count
    num_layers: Count
    attention_width: Count
    position_bytes: Annotated[int, Meta(ge=0)]

    def shape(self) -> Shape:
        """The same as the cost model takes it."""
        return Shape(
            self.num_parameters,
            Bytes(self.weight_bytes),
            Bytes(self.read_bytes),
            Bytes(self.kv_bytes_per_token),
            self.num_layers,
            self.attention_width,
            Bytes(self.position_bytes),
        )


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See `costs.LoadCosts`."""

    fixed: NotNegative
    bandwidth: Positive


class ModelProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model on the device."""

    shape: ModelShape
    knots: Annotated[tuple[tuple[Count, Positive], ...], Meta(min_length=2)]
    """(tokens of a step, seconds) without context, of decodes; of all steps if `prompt_knots` are missing."""
    per_pair: NotNegative
    per_context: NotNegative
    load: Load
    prompt_knots: Annotated[tuple[tuple[Count, Positive], ...], Meta(min_length=2)] | None = None
    """The same of steps with prompts."""

    def costs(self) -> Costs:
        """The same as the cost model takes it."""
        steps = measured(self.knots, self.per_pair, self.per_context, self.prompt_knots or ())
        return Costs(steps, LoadCosts(Seconds(self.load.fixed), self.load.bandwidth), self.shape.shape())


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device, and the models that were measured on it."""

    device: DeviceProfile
    models: dict[str, ModelProfile] = {}
    version: int = VERSION
    note: str = ""
    """Where the figures come from."""

    def costs(self, name: str, shape: Shape | None = None) -> Costs:
        """Measured costs of a model, or what follows from its shape. Raises `ConfigError` without either."""
        entry = self.models.get(name)
        if entry is not None:
            return entry.costs()
        if shape is None:
            known = ", ".join(sorted(self.models)) or "none"
            raise ConfigError([f"model {name} is not in the profile (it has {known}), and has no shape"])
        return from_shape(shape, self.device.rates.rates())

    def together(self, lanes: int) -> float:
        """How much more so many lanes of decodes do than one: between measured numbers in straight lines."""
        return overlap_factor(self.device.overlap, lanes)


def overlap_factor(overlap: Mapping[int, float], lanes: int) -> float:
    """See `Profile.together`; beyond the most lanes that were measured nothing is gained."""
    points = [(1, 1.0), *sorted(overlap.items())]
    for (n0, f0), (n1, f1) in pairwise(points):
        if lanes <= n1:
            return f0 + (f1 - f0) * (lanes - n0) / (n1 - n0)
    return points[-1][1]


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises `ConfigError` that names file and field."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    return parse_profile(content, str(path))


def parse_profile(content: bytes | str, source: str) -> Profile:
    """The profile in a text that comes from `source`; see `read_profile`."""
    try:
        profile = msgspec.json.decode(content, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # ValidationError is one
        raise ConfigError([f"{source}: {error}"]) from None
    if profile.version != VERSION:
        raise ConfigError([f"{source}: version must be {VERSION}, not {profile.version}"])
    problems = []
    for name, model in profile.models.items():
        for field, knots in (("knots", model.knots), ("prompt_knots", model.prompt_knots or ())):
            sizes = [tokens for tokens, _ in knots]
            if len(set(sizes)) != len(sizes):
                problems.append(f"{source}: models.{name}.{field}: a number of tokens comes twice")
    if problems:
        raise ConfigError(problems)
    return profile


def write_profile(profile: Profile, path: Path) -> None:
    """Write a file that `read_profile` reads back as the same."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")
