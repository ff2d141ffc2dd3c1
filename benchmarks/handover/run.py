"""10 GiB of KV pass from an idle model to a busy one while a third decodes, on one GPU.

Usage: scripts/bench handover [--gib 10] [--output results.json]
A (8B shape) leaves its prefix cache; B (8B) takes the slabs; C (1B) decodes on another lane all the while.
B takes them as a worker's models do, so many as a step of 8,192 tokens fills before each of its steps; then
once more all at once, as for an activation. Last it does so while it decodes itself, four sequences, and C's
gaps around are to be seen beside those a moment before.
"""

from __future__ import annotations

import argparse
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
from local import LocalModel, next_step, open_device, prompt

from prism.memory.slabs import KvOwner
from prism.types import Bytes, GiB, RequestId
from prism.worker import garbage
from prism.worker.loop import ASIDE_SECONDS

STEP_TOKENS = 8192
"""Of a step, at most: four times a worker's default, so its portions are a quarter."""
OWN_GIB = 2.0
"""KV that giver and taker have besides what is handed over, for what they compute."""


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
            step = next_step(engine, STEP_TOKENS)
            if step is not None:
                self.flights.append(engine.run(step))
                self.flights[-1].launch()
        self.model.device.backend.work_aside(ASIDE_SECONDS, urgent_only=False)

    def run_for(self, seconds: float, *others: Decoding) -> None:
        """Go on for a while, in turns with others."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for each in (self, *others):
                each.work()

    def stop(self) -> None:
        """Drop all requests, once what is queued has run."""
        for sequence in (*self.model.engine.scheduler.running, *self.model.engine.scheduler.waiting):
            self.model.engine.cancel(sequence.request_id)
        while self.flights:
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


def handed_over(a: LocalModel, b: LocalModel, decoding: Decoding, slabs: int, portion: int, runs: int) -> Any:
    """Hands `slabs` over to and fro, a portion at a time, while a third model goes on; milliseconds."""
    c, owners = decoding.model, (a, b)
    loop, whole, gaps = [], [], []
    for turn in range(runs):
        giver, taker = owners[turn % 2], owners[1 - turn % 2]
        fill(giver)
        start_neighbour(c)
        decoding.run_for(0.1)
        begin, spent = time.perf_counter(), 0.0
        for first in range(0, slabs, portion):
            spent += pass_on(giver, taker, min(portion, slabs - first))
            decoding.work()
        loop.append(1e3 * spent)
        whole.append(1e3 * (time.perf_counter() - begin))
        decoding.run_for(0.05)
        gaps.append(max(decoding.gaps_ms(begin, begin + 0.05)))
    return {
        "slabs_at_a_time": portion,
        "handover_ms": spread(loop),
        "from_first_to_last_ms": spread(whole),
        "neighbour_worst_gap_around_ms": spread(gaps),
    }


def handed_to_busy(a: Decoding, b: Decoding, neighbour: Decoding, slabs: int, portion: int, runs: int) -> Any:
    """The same while the taker decodes, too; milliseconds."""
    loop, before, gaps = [], [], []
    for turn in range(runs):
        giver, taker = (a, b) if turn % 2 == 0 else (b, a)
        fill(giver.model)
        start_neighbour(neighbour.model)
        for i in range(4):
            taker.model.add(f"busy{turn}.{i}", prompt(100 * turn + i, 256), 3000)
        neighbour.run_for(0.3, taker)
        quiet = time.perf_counter()
        neighbour.run_for(0.05, taker)
        begin, spent = time.perf_counter(), 0.0
        assert len(taker.model.engine.scheduler.running) == 4 and taker.gaps_ms(quiet, begin)
        before.append(max(neighbour.gaps_ms(quiet, begin)))
        for first in range(0, slabs, portion):
            spent += pass_on(giver.model, taker.model, min(portion, slabs - first))
            neighbour.work()
            taker.work()
        loop.append(1e3 * spent)
        neighbour.run_for(0.05, taker)
        gaps.append(max(neighbour.gaps_ms(begin, begin + 0.05)))
        taker.stop()
    return {
        "slabs_at_a_time": portion,
        "handover_ms": spread(loop),
        "neighbour_worst_gap_before_ms": spread(before),
        "neighbour_worst_gap_around_ms": spread(gaps),
    }


def start_neighbour(c: LocalModel) -> None:
    """A new request in the place of the one before, whose context has an end."""
    c.engine.cancel(RequestId("c"))
    c.add("c", prompt(1, 512), 7600)


def spread(values: list[float]) -> dict[str, float]:
    """Median and worst."""
    return {"median": round(statistics.median(values), 2), "worst": round(max(values), 2)}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=10)
    parser.add_argument("--runs", type=int, default=16, help="to and fro, so an even number")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.runs < 2 or options.runs % 2:
        parser.error("--runs: must be even, and not 0")
    with tempfile.TemporaryDirectory() as name:
        device = open_device(Bytes(60 * GiB), lanes=2, batch=64)
        folder = Path(name)
        a = LocalModel(device, "8b", "a", folder, options.gib + OWN_GIB)
        c = LocalModel(device, "1b", "c", folder, 4)
        b = LocalModel(device, "8b", "b", folder, OWN_GIB)
    garbage.take_over()
    count = options.gib * GiB // device.slab_bytes
    decoding = Decoding(c)
    c.add("warm", prompt(0, 512), 300)
    decoding.run_for(0.6)
    start_neighbour(c)
    decoding.run_for(1.0)
    quiet = time.perf_counter()
    decoding.run_for(1.5)
    alone = decoding.gaps_ms(quiet, time.perf_counter())
    layout = a.engine.kv.layout
    portion = -(-STEP_TOKENS // (layout.blocks_per_slab * layout.tokens_per_block))
    result = {
        "gpu": torch.cuda.get_device_name(),
        "gib": options.gib,
        "slabs": count,
        "neighbour_gap_ms": {"median": round(statistics.median(alone), 3), "worst": round(max(alone), 2)},
        "in_steps": handed_over(a, b, decoding, count, portion, options.runs),
        "at_once": handed_over(a, b, decoding, count, count, options.runs),
    }
    c.settle()
    busy = Decoding(a), Decoding(b)
    result["to_busy_in_steps"] = handed_to_busy(*busy, decoding, count, portion, options.runs)
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
