"""Packing a model's random weights, and their way from registered host memory to the device."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from llama import SHAPES

from prism.memory import memfd
from prism.memory.slabs import WeightsOwner
from prism.types import Bytes, GiB, ModelId, Quantization
from prism.weights.client import PackedWeights
from prism.weights.link import ThreadLink
from prism.weights.packer import pack, plan_source
from prism.weights.places import Places
from prism.weights.protocol import Manifest, WeightSource
from prism.weights.registrations import Registrations
from prism.worker.device import Device
from prism.worker.loading import Load, LoadPlan, unload

RUNS = 4


def activation(device: Device, shape: str, quantization: Quantization, folder: Path) -> dict[str, Any]:
    """Seconds of mapping, copying and verifying; of several runs the median of all but the first."""
    path = folder / f"{shape}-{quantization}-packed"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPES[shape]))
    name = ModelId(path.name)
    source = WeightSource(model=name, path=str(path), load_format="dummy", quantization=quantization)
    layout = plan_source(source)
    manifest = Manifest(model=name, total_bytes=layout.total_bytes, fingerprint=layout.fingerprint)
    fd = memfd.create_memfd("prism-bench")
    begin = time.perf_counter()
    pack(source, fd, lambda _: None)
    packing = time.perf_counter() - begin

    def borrow(model: ModelId, *, writable: bool = False) -> PackedWeights:
        return PackedWeights(manifest, fd, None, writable=writable)

    assert device.backend.pinner is not None
    registrations = Registrations(device.backend.pinner, borrow, Bytes(64 * GiB), [name])
    registrations.announce(name, layout.total_bytes)
    while registrations.step():
        pass
    assert registrations.total_bytes == layout.total_bytes, registrations.error
    link = ThreadLink(device.backend.copier)
    pool, owner, times = device.pool, WeightsOwner(name), []
    for _ in range(RUNS):
        arena = device.new_arena(layout.total_bytes)
        slabs = pool.take(owner, arena.num_slabs)
        pool.add_alias(slabs)
        plan = LoadPlan(
            model=name,
            layout=layout,
            arena=arena,
            handles=tuple(pool.handle(slab) for slab in slabs),
            places=Places(tuple(pool.address(slab) for slab in slabs), pool.slab_bytes),
            prepare=lambda: None,
            fill=lambda: None,
        )
        event = Load(plan, borrow, registrations, link, time.perf_counter).run()
        assert event.error is None, event.error
        times.append(event.seconds)
        pool.give_back(owner, slabs)
        assert unload(name, arena, 0.0).error is None
        pool.remove_alias(slabs)
        arena.close()
    link.close()
    registrations.close()
    os.close(fd)
    return {
        "weights_gb": round(layout.total_bytes / 1e9, 3),
        "packing_s": round(packing, 2),
        "activation_s": round(statistics.median(times[1:]), 4),
    }
