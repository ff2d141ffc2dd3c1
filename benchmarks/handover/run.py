"""10 GiB of KV pass from an idle model to a busy one while a third decodes, on one GPU.

Usage: scripts/bench handover [--gib 10] [--output results.json]
A (8B shape) leaves its prefix cache; B (8B) takes the slabs; C (1B) decodes on another lane all the while.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from local import ASIDE_SECONDS, LocalModel, open_device, prompt

from prism.memory.slabs import KvOwner
from prism.types import Bytes, GiB, RequestId


class Decoding:
    """A model that decodes; `work` does what can be done now."""

    def __init__(self, model: LocalModel) -> None:
        self.model = model
        self.flights: list[Any] = []
        self.times: list[float] = []

    def work(self) -> None:
        """Commit what has run, queue what can be queued."""
        engine = self.model.engine
        while self.flights and self.flights[0].is_done():
            if engine.commit(self.flights.pop(0)):
                self.times.append(time.perf_counter())
        if len(self.flights) < 2 and engine.scheduler.has_work:
            step = engine.schedule(8192)
            if step is not None:
                self.flights.append(engine.run(step))
                self.flights[-1].launch()
        self.model.device.backend.work_aside(ASIDE_SECONDS, urgent_only=False)

    def run_for(self, seconds: float) -> None:
        """Go on for a while."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.work()

    def gaps_ms(self, begin: float, end: float) -> list[float]:
        """Between tokens of a span."""
        return [1e3 * (b - a) for a, b in pairwise(self.times) if begin <= b <= end]


def fill(model: LocalModel) -> None:
    """A prefix cache in every block, as finished requests leave it."""
    kv = model.engine.kv
    blocks = kv.allocate(kv.num_free) or []
    for block in blocks:
        kv.publish(block, b"%d" % block)
    kv.release(blocks)


def pass_on(giver: LocalModel, taker: LocalModel, count: int) -> float:
    """Seconds that the loop spends on it: gather, give back, take, add."""
    pool = giver.device.pool
    begin = time.perf_counter()
    gathered = giver.engine.kv.gather(count)
    for slab in gathered.slabs:
        giver.engine.kv.remove_slab(slab)
    pool.give_back(KvOwner(giver.name), gathered.slabs, giver.lane.stamp())
    for slab in pool.take(KvOwner(taker.name), count, taker.lane.lane_id):
        taker.engine.kv.add_slab(slab)
    assert len(gathered.slabs) == count and not gathered.moves
    return time.perf_counter() - begin


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=10)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        device = open_device(Bytes(56 * GiB), lanes=2, batch=64)
        folder = Path(name)
        a, c = LocalModel(device, "8b", "a", folder, options.gib), LocalModel(device, "1b", "c", folder, 4)
        b = LocalModel(device, "8b", "b", folder, 0.5)
    gc.freeze()  # as the worker's process does
    count = options.gib * GiB // device.slab_bytes
    decoding = Decoding(c)
    c.add("warm", prompt(0, 512), 300)
    decoding.run_for(0.6)
    neighbour = RequestId("c")
    c.add(neighbour, prompt(1, 512), 7600)
    decoding.run_for(1.0)
    quiet = time.perf_counter()
    decoding.run_for(1.5)
    spans, owners = [], (a, b)
    busy = time.perf_counter()
    for turn in range(options.runs):
        giver, taker = (owners[turn % 2], owners[1 - turn % 2])
        fill(giver)
        c.engine.cancel(neighbour)  # its context has an end
        neighbour = RequestId(f"c{turn}")
        c.add(neighbour, prompt(2 + turn, 512), 2000)
        decoding.run_for(0.1)
        begin = time.perf_counter()
        spans.append((pass_on(giver, taker, count), begin))
        decoding.run_for(0.05)
    alone = decoding.gaps_ms(quiet, busy)
    with_it = [max(decoding.gaps_ms(begin, begin + 0.05)) for _, begin in spans]
    result = {
        "gpu": torch.cuda.get_device_name(),
        "gib": options.gib,
        "slabs": count,
        "handover_ms": {"median": round(1e3 * statistics.median(s for s, _ in spans), 2)},
        "neighbour_gap_ms": {
            "median": round(statistics.median(alone), 3),
            "worst_alone": round(max(alone), 2),
        },
        "neighbour_worst_gap_around_ms": {
            "median": round(statistics.median(with_it), 2),
            "worst": round(max(with_it), 2),
        },
    }
    result["handover_ms"]["worst"] = round(1e3 * max(s for s, _ in spans), 2)
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
