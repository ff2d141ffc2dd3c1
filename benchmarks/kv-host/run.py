"""A conversation's next turn after its model was evicted and came back: KV fetched or computed again.

Usage: scripts/bench kv-host [--tokens 4000] [--output results.json]
A (8B shape) holds the conversation; C (1B) decodes on the same lane while A's KV leaves. Loading the weights,
which is the same in both cases, is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from local import LocalModel, open_device, prompt

from prism.config import ModelConfig
from prism.engine.kv_blocks import KvSpace
from prism.memory.slabs import KvOwner
from prism.memory.tensors import tensor_at
from prism.types import Bytes, GiB
from prism.worker import garbage
from prism.worker.cost_book import CostBook
from prism.worker.holdings import Holdings
from prism.worker.host_chunks import HostChunks
from prism.worker.host_kv import HostKv
from prism.worker.models import Model
from prism.worker.reclaimer import Reclaimer
from prism.worker.requests import Requests


class Bench:
    """Two models on one lane, with the worker's own host tier and reclaimer."""

    def __init__(self, folder: Path, host_bytes: int) -> None:
        self.device = open_device(Bytes(60 * GiB), lanes=1, batch=64)
        chunks = HostChunks(
            self.device.slab_bytes, host_bytes // self.device.slab_bytes, self.device.backend.pinner
        )
        begin = time.perf_counter()
        chunks.ask(chunks.max_chunks)
        while chunks.make():
            pass
        self.pin_seconds = time.perf_counter() - begin
        assert chunks.error is None, chunks.error
        self.book = CostBook(self.device.rates, {})
        self.host = HostKv(self.device, chunks, self.book)
        self.host.tend({})
        self.models: dict[str, Model] = {}
        self.local: dict[str, LocalModel] = {}
        self.flights: deque[Any] = deque()
        self.times: dict[str, list[float]] = {}
        self.reclaimer = Reclaimer(self.device, self.models, self._new_holdings(), lambda _: None, self.host)
        for shape, name in (("8b", "a"), ("1b", "c")):
            self._add_model(shape, name, folder)

    def _new_holdings(self) -> Holdings:
        """Nobody is asked for memory here."""
        return Holdings(
            self.device.pool,
            self.models,
            Requests(),
            self.host,
            self.book,
            min_residency=0.0,
            max_wait=0.0,
            idle_threshold=0.0,
        )

    def _add_model(self, shape: str, name: str, folder: Path) -> None:
        local = self.local[name] = LocalModel(self.device, shape, name, folder, 2.0, 64)
        model = Model(ModelConfig(name=name, path=str(folder / name)), 0, None, False)
        model.profile, model.engine, model.kv, model.lane = (
            local.profile,
            local.engine,
            local.engine.kv,
            local.lane,
        )
        self.models[name] = model
        self.book.learn(model.name, local.profile)
        self.host.open(model, b"random")

    def work(self) -> None:
        """One round of what the worker's loop does."""
        self.host.settle()
        for lane in (self.device.lanes[0], self.device.swap):
            for flight in lane.finished():
                if flight.step is not None:
                    engine = self.local[flight.model].engine
                    if engine.commit(flight.step):
                        self.times.setdefault(flight.model, []).append(time.perf_counter())
            self.device.pool.completed(lane.lane_id, lane.num_completed)
        for name, model in self.models.items():
            engine = self.local[name].engine
            if engine.num_queued < 2 and engine.scheduler.has_work:
                step = engine.schedule(8192)
                if step is not None:
                    self.host.save_dropped(model, step.dropped)
                    self.host.fetch(model, step.fetches)
                    running = engine.run(step)
                    running.launch()
                    self.device.lanes[0].queue(model.name, running, running)

    def work_for(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.work()

    def ask(self, name: str, request: str, tokens: list[int], count: int) -> tuple[list[int], float]:
        """The answer, and seconds to its first token."""
        self.times[name] = []
        begin = time.perf_counter()
        self.local[name].add(request, tokens, count)
        (sequence,) = self.local[name].engine.scheduler.waiting
        while not sequence.is_ended:
            self.work()
        return sequence.tokens[len(tokens) :], self.times[name][0] - begin

    def evict(self, name: str) -> float:
        """Seconds that the loop spends on it."""
        model = self.models[name]
        begin = time.perf_counter()
        self.reclaimer.release_kv(model)
        return time.perf_counter() - begin

    def bring_back(self, name: str) -> None:
        """Slabs full of something else."""
        while self.device.pool.num_retiring:
            self.work()
        model = self.models[name]
        assert model.profile is not None and model.engine is not None
        model.kv = KvSpace(model.profile.kv)
        for slab in self.device.pool.take(KvOwner(model.name), 64):
            address = self.device.pool.address(slab)
            tensor_at(address, (self.device.slab_bytes,), torch.uint8, None, self.device.device).random_()
            model.kv.add_slab(slab)
        torch.cuda.synchronize()
        model.engine.attach(model.kv)


def turns(bench: Bench, tokens: int, runs: int) -> dict[str, Any]:
    """The turn after the eviction with and without the tier; the answers' first tokens are compared."""
    scheduler = bench.local["a"].engine.scheduler
    tier = scheduler.host
    result: dict[str, list[float]] = {"fetch": [], "compute": [], "evict": []}
    texts: dict[str, list[list[int]]] = {"fetch": [], "compute": []}
    for run in range(runs + 1):
        first = prompt(run, tokens)
        answer, _ = bench.ask("a", f"first{run}", first, 64)
        for way in ("fetch", "compute"):
            spent = bench.evict("a")
            bench.bring_back("a")
            scheduler.host = tier if way == "fetch" else None
            text, seconds = bench.ask("a", f"{way}{run}", [*first, *answer, *prompt(99, 50)], 16)
            if run:
                result[way].append(seconds)
                texts[way].append(text)
                if way == "fetch":
                    result["evict"].append(spent)
    same = sum(a[0] == b[0] for a, b in zip(texts["fetch"], texts["compute"], strict=True))
    return {
        "tokens": tokens,
        "ttft_fetch_ms": round(1e3 * statistics.median(result["fetch"]), 2),
        "ttft_compute_ms": round(1e3 * statistics.median(result["compute"]), 2),
        "evict_loop_ms": round(1e3 * statistics.median(result["evict"]), 2),
        "evict_loop_worst_ms": round(1e3 * max(result["evict"]), 2),
        "same_first_tokens": f"{same}/{runs}",
    }


def neighbour(bench: Bench, runs: int) -> dict[str, Any]:
    """Gaps between tokens of C, which decodes on A's lane, around evictions of A with 1 GiB to save."""
    bench.local["c"].add("c", prompt(1, 512), 7000)
    bench.work_for(1.0)
    bench.times["c"] = []
    bench.work_for(1.0)
    alone = [1e3 * (b - a) for a, b in pairwise(bench.times["c"])]
    worst: list[float] = []
    saved: list[int] = []
    for _ in range(runs):
        kv = bench.models["a"].kv
        assert kv is not None
        blocks = kv.allocate(512) or []
        for block in blocks:
            kv.publish(block, b"%d %d" % (len(worst), block))
        kv.release(blocks)
        bench.work_for(0.2)
        bench.times["c"] = []
        bench.work_for(0.02)
        before = bench.host.counts(bench.models["a"].name)[0]
        bench.evict("a")
        saved.append(bench.host.counts(bench.models["a"].name)[0] - before)
        bench.work_for(0.08)
        worst.append(max(1e3 * (b - a) for a, b in pairwise(bench.times["c"])))
        bench.bring_back("a")
    return {
        "gap_ms": round(statistics.median(alone), 3),
        "worst_gap_alone_ms": round(max(alone), 2),
        "worst_gap_around_evictions_ms": round(max(worst), 2),
        "median_of_worst_ms": round(statistics.median(worst), 2),
        "blocks_saved": saved,
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), 2 * GiB)
    garbage.take_over()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "pin_s_per_gib": round(bench.pin_seconds / 2, 3),
        "turn": turns(bench, options.tokens, options.runs),
        "neighbour": neighbour(bench, options.runs),
        "save_gb_s": round(bench.host.saving.value / 1e9, 1),
        "fetch_gb_s": round(bench.host.fetching.value / 1e9, 1),
    }
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
