"""`prism profile` from a configuration to a profile file."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

from prism.calibration import loads
from prism.calibration.fit import fit_steps
from prism.calibration.loads import Decodes
from prism.calibration.models import LoadedModel, LoadTime, RandomWeights
from prism.calibration.overlap import BATCH, CONTEXT, NUM_STEPS, WARM_STEPS, overlap_factor
from prism.calibration.plan import Limits
from prism.calibration.steps import measure_steps
from prism.calibration.summary import print_fit, print_profile
from prism.config import Config, DeviceConfig, ModelConfig
from prism.costs import StepCosts
from prism.errors import ConfigError, PrismError
from prism.outputs import check_output
from prism.profile import DeviceProfile, Load, ModelProfile, ModelShape, Profile, Rates, write_profile
from prism.types import Bytes
from prism.worker.cost_book import shape_of
from prism.worker.device import Device
from prism.worker.models import Profile as WorkerProfile
from prism.worker.models import read_profile
from prism.worker.open_device import open_device

NUM_LOADS = 3
"""After a first one that compiles kernels and faults pages in."""
LANES = (2, 4, 8)
KV_TOKENS = 1 << 18
"""Room for more context than any size of steps that is measured has."""

Say = Callable[[str], None]


def run_profile(config: Config, index: int, output: Path, say: Say) -> int:
    """Measure the device at this place of the configuration, and its models; the exit status."""
    if not 0 <= index < len(config.devices):
        raise ConfigError([f"--device {index}: the configuration has {len(config.devices)} devices"])
    check_output("--output", output)
    settings = config.devices[index]
    models = [model for model in config.models if model.device in (None, index)]
    with closing(_open_device(settings, models)) as device:
        calibration = _Calibration(device, settings, models, say)
        found = calibration.profiles()
        profile = Profile(calibration.device_profile(), found)
    write_profile(profile, output)
    print_profile(profile, output)
    return 0 if found else 1


def _open_device(settings: DeviceConfig, models: list[ModelConfig]) -> Device:
    try:
        return open_device(settings, models)
    except (PrismError, RuntimeError, ImportError) as error:  # no GPU, no driver, no Triton
        hint = "prism doctor says what is missing"
        raise ConfigError([f"{settings.kind}:{settings.index} cannot be opened ({hint}): {error}"]) from None


class _Calibration:
    """One device."""

    def __init__(self, device: Device, settings: DeviceConfig, models: list[ModelConfig], say: Say) -> None:
        self._device = device
        self._settings = settings
        self._models = models
        self._say = say

    def profiles(self) -> dict[str, ModelProfile]:
        """Profiles by name; of models of one shape the first is measured. Who does not fit is told."""
        by_shape: dict[Any, ModelProfile] = {}
        found = {}
        for model in self._models:
            try:
                key = _shape_key(read_profile(model, self._device.slab_bytes))
                if key not in by_shape:
                    by_shape[key] = self._model(model)
                found[model.name] = by_shape[key]
            except PrismError as error:
                self._say(f"{model.name} is left out: {error}")
        return found

    def _model(self, config: ModelConfig) -> ModelProfile:
        self._say(f"{config.name}: packing random weights")
        with closing(RandomWeights(config, self._device)) as weights:
            times = self._loads(config, weights)
            with self._open(config) as model:
                model.load(weights)
                points = measure_steps(model, self._limits(model), self._say)
        costs = fit_steps(points)
        print_fit(config.name, costs, points)
        return _model_profile(model.profile, costs, times)

    def _loads(self, config: ModelConfig, weights: RandomWeights) -> list[LoadTime]:
        """Beside decodes of the smallest model, if there is room for both.

        A server loads beside steps: its loop and the thread that copies want the interpreter at a time, and
        on an H100 its loads took 1.7 to 2.4 times as long as alone.
        """
        self._say(f"{config.name}: loading")
        with ExitStack() as stack:
            model = stack.enter_context(self._open(config, kv_slabs=1))
            neighbour = self._neighbour(stack)
            meanwhile = None if neighbour is None else neighbour.turn
            return [model.load(weights, meanwhile) for _ in range(1 + NUM_LOADS)][1:]

    def _neighbour(self, outer: ExitStack) -> Decodes | None:
        config = self._smallest()
        assert config is not None
        try:
            with ExitStack() as stack:
                weights = stack.enter_context(closing(RandomWeights(config, self._device)))
                tokens = loads.BATCH * (loads.CONTEXT + loads.MOST_TOKENS)
                model = stack.enter_context(
                    self._open(config, f"{config.name}-beside", self._slabs(config, tokens))
                )
                model.load(weights)
                neighbour = stack.enter_context(closing(Decodes(model)))
                outer.push(stack.pop_all())
                return neighbour
        except PrismError as error:
            self._say(f"loads are measured without steps beside them: {error}")
            return None

    def _slabs(self, config: ModelConfig, tokens: int) -> int:
        """That hold so many tokens, and a block begun of each sequence."""
        profile = read_profile(config, self._device.slab_bytes)
        tokens += BATCH * profile.kv.tokens_per_block
        return 1 + -(-tokens * profile.spec.kv_bytes_per_token // self._device.slab_bytes)

    def _open(self, config: ModelConfig, name: str | None = None, kv_slabs: int | None = None) -> LoadedModel:
        profile = read_profile(config, self._device.slab_bytes)
        if kv_slabs is None:
            kv_slabs = -(-KV_TOKENS * profile.spec.kv_bytes_per_token // self._device.slab_bytes)
        return LoadedModel(
            self._device,
            config,
            name=name or config.name,
            max_batch_size=self._settings.max_batch_size,
            kv_slabs=kv_slabs,
        )

    def _limits(self, model: LoadedModel) -> Limits:
        settings = self._settings
        return Limits(
            max_batch=min(settings.max_batch_size, self._device.backend.max_sequences),
            max_tokens=settings.max_batch_tokens,
            max_len=model.profile.spec.max_position,
            num_blocks=model.num_blocks,
            tokens_per_block=model.profile.kv.tokens_per_block,
        )

    def device_profile(self) -> DeviceProfile:
        """The device itself."""
        rates = self._device.rates
        return DeviceProfile(
            name=device_name(self._device.device),
            memory_bytes=device_memory(self._device.device),
            rates=Rates(rates.flops, rates.bandwidth, rates.link, rates.launch),
            overlap=self._overlap(),
        )

    def _overlap(self) -> dict[int, float]:
        """Of the smallest model, as often as there are lanes and room."""
        found: dict[int, float] = {}
        config = self._smallest()
        for lanes in LANES:
            if config is None or lanes > self._device.backend.num_lanes:
                break
            self._say(f"{config.name}: {lanes} times, on as many lanes")
            try:
                found[lanes] = self._together(config, lanes)
            except PrismError as error:
                self._say(f"{lanes} lanes are left out: {error}")
                break
        return found

    def _smallest(self) -> ModelConfig | None:
        sizes = []
        for model in self._models:
            try:
                sizes.append((read_profile(model, self._device.slab_bytes).weight_slabs, model))
            except PrismError:
                continue  # it has been told
        return min(sizes, key=lambda pair: pair[0])[1] if sizes else None

    def _together(self, config: ModelConfig, count: int) -> float:
        slabs = self._slabs(config, BATCH * (CONTEXT + 4 * (WARM_STEPS + NUM_STEPS)))
        with ExitStack() as stack:
            weights = stack.enter_context(closing(RandomWeights(config, self._device)))
            opened = [
                stack.enter_context(self._open(config, f"{config.name}-{i}", slabs)) for i in range(count)
            ]
            for model in opened:
                model.load(weights)
            return overlap_factor(opened)


def _shape_key(profile: WorkerProfile) -> tuple[object, ...]:
    spec = profile.spec
    return (profile.weights.fingerprint, spec.num_heads, spec.num_kv_heads, spec.max_position)


def _model_profile(profile: WorkerProfile, costs: StepCosts, loads: list[LoadTime]) -> ModelProfile:
    shape = shape_of(profile)
    copy = median(load.copy for load in loads)
    whole = median(load.whole for load in loads)
    return ModelProfile(
        shape=ModelShape(
            shape.num_parameters,
            shape.weight_bytes,
            shape.read_bytes,
            shape.kv_bytes_per_token,
            shape.num_layers,
            shape.attention_width,
            shape.position_bytes,
        ),
        knots=costs.knots,
        prompt_knots=costs.prompt_knots or None,
        per_pair=costs.per_pair,
        per_context=costs.per_context,
        load=Load(fixed=max(0.0, whole - copy), bandwidth=shape.weight_bytes / copy),
    )


def device_name(device: torch.device) -> str:
    """What it is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def device_memory(device: torch.device) -> Bytes:
    """All of it."""
    if device.type == "cuda":
        return Bytes(torch.cuda.get_device_properties(device).total_memory)
    return Bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
