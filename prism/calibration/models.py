"""One model on a device without a worker around it: loaded as a worker loads it, with random weights."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import torch

from prism.config import ModelConfig
from prism.engine.engine import Engine
from prism.engine.kv_blocks import KvSpace
from prism.memory import memfd
from prism.memory.slabs import KvOwner, WeightsOwner
from prism.models.decoder import Decoder
from prism.types import ModelId
from prism.weights.client import PackedWeights
from prism.weights.link import Link, ThreadLink
from prism.weights.packer import pack, plan_source
from prism.weights.places import Places
from prism.weights.protocol import Manifest, WeightSource
from prism.weights.registrations import Registrations
from prism.weights.transfers import Transfer
from prism.worker.device import Device
from prism.worker.loading import Load, Loaded, LoadPlan
from prism.worker.models import read_profile

clock = time.perf_counter


class LoadTime(NamedTuple):
    """One load in seconds."""

    whole: float
    copy: float


class RandomWeights:
    """A model's packed weights in a memory file of this process, registered with the device if it can.

    Random ones of its shape, whatever its directory holds: they cost the same.
    """

    def __init__(self, config: ModelConfig, device: Device) -> None:
        self.source = WeightSource(
            model=ModelId(config.name),
            path=config.path,
            load_format="dummy",
            dtype=config.dtype,
            quantization=config.quantization,
        )
        self._fd = memfd.create_memfd("prism-profile")
        try:
            pack(self.source, self._fd, lambda _: None)
        except BaseException:
            os.close(self._fd)
            raise
        layout = plan_source(self.source)
        self._manifest = Manifest(
            model=config.name, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint
        )
        self.registrations: Registrations | None = None
        if device.backend.pinner is not None:
            name = ModelId(config.name)
            self.registrations = Registrations(
                device.backend.pinner, self._borrow, layout.total_bytes, [name]
            )
            self.registrations.announce(name, layout.total_bytes)
            while self.registrations.step():
                pass

    def _borrow(self, model: ModelId, *, writable: bool) -> PackedWeights:
        return PackedWeights(self._manifest, self._fd, None, writable=writable)

    def fetch(self, model: ModelId) -> PackedWeights:
        """See `loading.Fetch`."""
        return self._borrow(model, writable=False)

    def close(self) -> None:
        """Give the memory back."""
        if self.registrations is not None:
            self.registrations.close()
        os.close(self._fd)


class TimedLink:
    """A link that tells how long a transfer took."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._watcher: threading.Thread | None = None
        self.seconds = 0.0

    def start(self, transfer: Transfer) -> None:
        """See `Link.start`."""
        begin = clock()

        def watch() -> None:
            transfer.has_ended.wait()
            self.seconds = clock() - begin

        self._watcher = threading.Thread(target=watch)
        self._watcher.start()
        self._link.start(transfer)

    def wait(self, transfer: Transfer) -> None:
        """See `Link.wait`."""
        self._link.wait(transfer)
        assert self._watcher is not None
        self._watcher.join()


def _run_beside(load: Load, meanwhile: Callable[[], None]) -> Loaded:
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load.run)
        while True:
            meanwhile()
            if loaded.done():
                return loaded.result()


class LoadedModel:
    """An engine on a lane. Use as a context manager; raises `PrismError` for what the device cannot hold."""

    def __init__(
        self, device: Device, config: ModelConfig, *, name: str, max_batch_size: int, kv_slabs: int
    ) -> None:
        self.device, self.name = device, ModelId(name)
        profile = self.profile = read_profile(config, device.slab_bytes)
        spec = profile.spec
        device.backend.check(spec)
        self._arena = device.new_arena(profile.arena_bytes)
        try:
            self._slabs = device.pool.take(WeightsOwner(self.name), profile.weight_slabs)
        except BaseException:
            self._arena.close()
            raise
        self.kv = KvSpace(profile.kv)
        for slab in device.pool.take(KvOwner(self.name), min(kv_slabs, device.pool.num_free)):
            self.kv.add_slab(slab)
        self.lane = device.bind()
        weights, rotary = (
            device.weight_tensors(profile, self._arena),
            device.rotary_tensor(profile, self._arena),
        )
        decoder = Decoder(spec, weights, rotary)
        runner = device.backend.runner(decoder, device.kv_view(spec, profile.kv), self.lane.lane_id)
        self.engine = Engine(
            self.kv, runner, self.lane.slots, max_len=spec.max_position, max_batch_size=max_batch_size
        )

    def load(self, weights: RandomWeights, meanwhile: Callable[[], None] | None = None) -> LoadTime:
        """Bring the weights in, once more if they are there; `meanwhile` is called until they are."""
        self._arena.unmap()
        link = ThreadLink(self.device.backend.copier)
        timed = TimedLink(link)
        try:
            load = Load(self._plan(weights), weights.fetch, weights.registrations, timed, clock)
            loaded = load.run() if meanwhile is None else _run_beside(load, meanwhile)
        finally:
            link.close()
        if loaded.error is not None:
            raise loaded.error
        return LoadTime(loaded.seconds, timed.seconds)

    def _plan(self, weights: RandomWeights) -> LoadPlan:
        device, pool, spec = self.device, self.device.pool, self.profile.spec

        return LoadPlan(
            model=ModelId(weights.source.model),
            layout=self.profile.weights,
            arena=self._arena,
            handles=tuple(pool.handle(slab) for slab in self._slabs),
            places=Places(tuple(pool.address(slab) for slab in self._slabs), pool.slab_bytes),
            prepare=lambda: device.backend.prepare(spec),
            fill=lambda: device.write_rotary(self.profile, self._arena),
        )

    @property
    def num_blocks(self) -> int:
        """KV blocks that it has in all."""
        return self.kv.num_free + self.kv.num_cached + self.kv.num_used

    def close(self) -> None:
        """Give all memory back."""
        if self.device.device.type == "cuda":
            torch.cuda.synchronize(self.device.device)
        self.device.backend.forget(self.engine.runner)
        self.lane.num_models -= 1
        self._arena.close()
        for owner in (WeightsOwner(self.name), KvOwner(self.name)):
            self.device.pool.give_back(owner, self.device.pool.owned(owner))

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
