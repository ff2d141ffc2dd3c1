"""Reads what a run is given: profile, trace, models, placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import msgspec

from prism.config import SchedulingConfig
from prism.configfile import load_config
from prism.errors import ConfigError
from prism.modes import Mode
from prism.profile import Profile, parse_profile, read_profile
from prism.sim.cluster import Cluster, Setup
from prism.sim.generate import Synthetic, generate
from prism.sim.modes import Limits, limits_of
from prism.sim.placing import Placement, Room, by_controller, by_load, demands
from prism.sim.trace import TraceRow, compress, read_trace
from prism.sim.workload import ModelEntry, Workload, read_models, workload
from prism.types import Bytes, ModelId

SHIPPED = ("h100", "h200")
MEMORY_SHARE = 0.92
"""Of a device's memory that weights and KV get by default; the rest is for intermediate results."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What both commands are given."""

    trace: Path | None
    synthetic: Synthetic
    models: Path | None
    profile: str
    config: Path | None
    memory: int | None
    lanes: int | None
    rate_scale: float
    slo_scale: float
    seed: int
    is_stepping: bool = False


def open_profile(name: str) -> Profile:
    """A file, or one of those that are shipped."""
    if name in SHIPPED:
        content = files("prism.sim").joinpath("profiles", f"{name}.json").read_bytes()
        return parse_profile(content, name)
    return read_profile(Path(name))


def read_rows(inputs: Inputs) -> list[TraceRow]:
    """The trace's requests, or made ones, at the rate that was asked for."""
    if inputs.trace is not None:
        rows = read_trace(inputs.trace)
    else:
        rows = generate(inputs.synthetic, inputs.seed)
    if not rows:
        raise ConfigError(["the trace that was made has no requests: raise --rate or --duration"])
    return rows if inputs.rate_scale == 1.0 else compress(rows, inputs.rate_scale)


def read_workload(inputs: Inputs, profile: Profile) -> Workload:
    """Models and requests."""
    entries: Mapping[ModelId, ModelEntry] | None = None
    if inputs.models is not None:
        entries = read_models(inputs.models, profile)
    return workload(read_rows(inputs), profile, inputs.slo_scale, entries)


def make_cluster(inputs: Inputs, load: Workload, profile: Profile, mode: Mode) -> Cluster:
    """Everything but the placement."""
    limits, memory = Limits(is_stepping=inputs.is_stepping), int(MEMORY_SHARE * profile.device.memory_bytes)
    scheduling, order = SchedulingConfig(), tuple[ModelId, ...]()
    if inputs.config is not None:
        config = load_config(inputs.config)
        limits, memory = limits_of(config, is_stepping=inputs.is_stepping), config.devices[0].memory
        scheduling, order = config.scheduling, tuple(ModelId(model.name) for model in config.models)
    if inputs.lanes is not None:
        limits = replace(limits, num_lanes=inputs.lanes)
    memory = memory if inputs.memory is None else inputs.memory
    if memory < 2 * limits.slab_bytes:
        raise ConfigError([f"--memory must hold two slabs of {limits.slab_bytes} bytes"])
    setup = Setup(mode, profile, Bytes(memory), limits, scheduling, order)
    return Cluster(load, setup, demands(load.requests, load.served))


def default_placement(cluster: Cluster, devices: int) -> Placement:
    """As the controller does it in `prism`, else by load."""
    setup, served = cluster.setup, cluster.load.served
    room = Room(served, setup.num_slabs, setup.limits.slab_bytes, setup.mode)
    if setup.mode is Mode.PRISM:
        return by_controller(
            served, cluster.demand, devices, room, setup.memory_bytes, setup.limits.slab_bytes
        )
    return by_load(cluster.demand, devices, room)


def read_placement(path: Path, cluster: Cluster, devices: int) -> Placement:
    """A JSON list of each device's models. Raises `ConfigError` for what does not fit together."""
    try:
        lists = msgspec.json.decode(path.read_bytes(), type=list[list[str]])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    setup, served = cluster.setup, cluster.load.served
    names = [name for models in lists for name in models]
    problems = (
        [f"{path}: lists {len(lists)} devices; --devices is {devices}"] if len(lists) != devices else []
    )
    problems += [f"{path}: model {name} is not in the trace" for name in sorted(set(names) - set(served))]
    problems += [f"{path}: model {n} has two devices" for n in sorted(set(names)) if names.count(n) > 1]
    placed = tuple(tuple(ModelId(name) for name in models) for models in lists)
    if not problems:
        room = Room(served, setup.num_slabs, setup.limits.slab_bytes, setup.mode)
        for index, models in enumerate(placed):
            if not room.holds(models):
                problems.append(f"{path}: the models of device {index} do not fit it in mode {setup.mode}")
    if problems:
        raise ConfigError(problems)
    return Placement(placed, tuple(sorted(model for model in served if model not in names)))
