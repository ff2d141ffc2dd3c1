"""What a model that decodes notices while another one's graphs are captured, and its steps launched.

Usage: scripts/bench capture [--runs 8] [--slice 0.0003] [--unprepared] [--output results.json]
On one GPU C (1B shape) decodes on a lane of its own. Beside it kernels of B (8B shape) are loaded and memory
for graphs is taken ahead; between its steps graphs of B are captured, for the first time in this process and
again; then B decodes without graphs, launched in slices. Both are done once more in one go, as it was before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from local import LocalModel, open_device, prompt

from prism.engine.gpu.draw_table import DrawPlaces
from prism.engine.gpu.graphs import Key
from prism.engine.gpu.runner import GpuRunner
from prism.types import Bytes, GiB, RequestId
from prism.weights.link import SWITCH_SECONDS
from prism.worker import garbage
from prism.worker.early import SLICE_SECONDS
from prism.worker.loop import ASIDE_SECONDS

NUM_LONGEST = 8
"""Slices that are told one by one."""


class Decoding:
    """A model that decodes; `work` does what can be done now."""

    def __init__(self, model: LocalModel, slice_seconds: float = SLICE_SECONDS) -> None:
        self.model = model
        self.flights: list[Any] = []
        self.times: list[float] = []
        self.slice_seconds = slice_seconds

    def work(self) -> None:
        """Commit what has run, launch more of the last step, or make the next one."""
        engine = self.model.engine
        while self.flights and self.flights[0].is_launched and self.flights[0].is_done():
            if engine.commit(self.flights.pop(0)):
                self.times.append(time.perf_counter())
        if self.flights and not self.flights[-1].is_launched:
            self.flights[-1].launch(None, self.slice_seconds)
        elif len(self.flights) < 2 and engine.scheduler.has_work:
            step = engine.schedule(8192)
            if step is not None:
                self.flights.append(engine.run(step))
                self.flights[-1].launch(None, self.slice_seconds)

    def run(self, until: Callable[[], bool], *others: Callable[[], object]) -> list[float]:
        """Go on, others' work in between; the gaps between tokens in ms."""
        begin = time.perf_counter()
        while not until():
            self.work()
            for other in others:
                other()
        return [1e3 * (b - a) for a, b in pairwise(self.times) if a >= begin]


def after(seconds: float) -> Callable[[], bool]:
    """True from then on."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


class Capturing:
    """The captures of a device, and how long each slice of them took."""

    def __init__(self, backend: Any, slice_seconds: float) -> None:
        self._backend = backend
        self._seconds = slice_seconds
        self.slices: list[tuple[float, str]] = []
        """Milliseconds, and for what: a stage of a capture (engine/gpu/captures.py), and its graph's rows."""
        self.is_over = False

    def has_ended(self) -> bool:
        """Nothing is left to capture."""
        return self.is_over

    def work(self) -> None:
        """A slice."""
        capture = self._backend._captures._capture
        stage = "begin" if capture is None else f"{capture._stage.name} {_rows(capture.wish.key)}"
        begin = time.perf_counter()
        self.is_over = not self._backend.work_aside(self._seconds, urgent_only=False)
        if not self.is_over:
            self.slices.append((1e3 * (time.perf_counter() - begin), stage))


def _rows(key: Key) -> str:
    return f"{key.size}+{key.prompt_rows}"


def go_on(c: Decoding) -> None:
    """A new request in the place of the one before, whose context has an end; its first token is there."""
    c.model.engine.cancel(RequestId("c"))
    c.run(lambda: c.model.engine.is_idle)
    c.model.add("c", prompt(1, 512), 7600)
    c.run(after(0.1))


def spread(gaps: list[float]) -> dict[str, float]:
    """Median, 99 % and worst."""
    ordered = sorted(gaps)
    return {
        "median": round(statistics.median(ordered), 3),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 3),
        "worst": round(ordered[-1], 3),
        "count": len(ordered),
    }


def prepared(device: Any, c: Decoding, b: LocalModel) -> dict[str, Any]:
    """C's gaps while a thread loads B's kernels and takes memory for graphs, as a worker's does."""
    free, begin = torch.cuda.mem_get_info()[0], time.perf_counter()
    with ThreadPoolExecutor(1) as executor:
        preparing = executor.submit(deque, device.backend.prepare_ahead(b.profile.spec), 0)
        gaps = c.run(preparing.done)
    preparing.result()
    return {
        "neighbour_gap_ms": spread(gaps),
        "s": time.perf_counter() - begin,
        "MiB": (free - torch.cuda.mem_get_info()[0]) >> 20,
    }


def captured(device: Any, c: Decoding, b: LocalModel, runs: int, seconds: float) -> dict[str, Any]:
    """C's gaps while all likely graphs of B are captured, so many times."""
    runner = b.engine.runner
    assert isinstance(runner, GpuRunner)
    gaps, slices, spans, graphs = [], [], [], 0
    for _ in range(runs):
        device.backend.forget(runner)
        runner.expect()
        capturing = Capturing(device.backend, seconds)
        before = device.backend.graph_usage.num_graphs
        begin = time.perf_counter()
        gaps += c.run(capturing.has_ended, capturing.work)
        spans.append(time.perf_counter() - begin)
        graphs += device.backend.graph_usage.num_graphs - before
        slices += capturing.slices
    longest = sorted(slices, reverse=True)[:NUM_LONGEST]
    return {
        "neighbour_gap_ms": spread(gaps),
        "slice_ms": spread([ms for ms, _ in slices]),
        "longest_slices": [f"{ms:.2f} ms: {stage}" for ms, stage in longest],
        "graphs": graphs,
        "s": sum(spans),
    }


def eager(device: Any, c: Decoding, b: LocalModel, seconds: float) -> dict[str, Any]:
    """C's gaps while B decodes without graphs."""
    device.backend.forget(b.engine.runner)
    other = Decoding(b, seconds)
    b.add(f"b{seconds}", prompt(int(seconds * 1e4) + 5, 300), 60)
    gaps = c.run(lambda: b.engine.is_idle, other.work)
    while other.flights:
        other.work()
    return {
        "neighbour_gap_ms": spread(gaps),
        "own_gap_ms": spread([1e3 * (y - x) for x, y in pairwise(other.times)]),
    }


def first_replays(b: LocalModel) -> list[float]:
    """Milliseconds of the first replay of each graph of decodes, whose rows are all padding."""
    runner, times = b.engine.runner, []
    assert isinstance(runner, GpuRunner)
    torch.cuda.synchronize()
    keys = [k for k in runner._graphs._graphs if k.owner == id(runner) and not k.prompt_rows]
    for key in keys:
        with torch.cuda.stream(runner.lane.stream):
            runner.lane.staging[DrawPlaces.behind(3 * key.size, key.size).rows].fill_(-1)
            columns = runner.lane.staging[: 3 * key.size].view(3, -1)
            columns.zero_()
            columns[1].fill_(-1)
        runner.lane.stream.synchronize()
        begin = time.perf_counter()
        runner._graphs.replay(key, runner.lane.stream)
        times.append(round(1e3 * (time.perf_counter() - begin), 3))
        runner.lane.stream.synchronize()
    return times


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--slice", type=float, default=ASIDE_SECONDS, help="seconds of a capture at a time")
    parser.add_argument("--unprepared", action="store_true", help="nothing is taken ahead")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_SECONDS)  # as a worker's link does
    with tempfile.TemporaryDirectory() as name:
        device = open_device(Bytes(40 * GiB), lanes=2, batch=64)
        folder = Path(name)
        model = LocalModel(device, "1b", "c", folder, 2)
        b = LocalModel(device, "8b", "b", folder, 2, is_new=True)
    garbage.take_over()
    c = Decoding(model)
    model.add("warm", prompt(0, 512), 100)
    aside = Capturing(device.backend, options.slice)
    c.run(lambda: model.engine.is_idle, aside.work)
    go_on(c)
    c.run(after(1.0), aside.work)
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "alone": spread(c.run(after(1.5)))}
    if not options.unprepared:
        result["kernels_ahead"] = prepared(device, c, b)
        go_on(c)
    result["captured_first"] = captured(device, c, b, 1, options.slice)
    result["captured_in_slices"] = captured(device, c, b, options.runs, options.slice)
    result["first_replays_ms"] = first_replays(b)
    result["graph_usage"] = device.backend.graph_usage._asdict()
    go_on(c)
    result["captured_at_once"] = captured(device, c, b, 2, float("inf"))
    result["launched_in_slices"] = eager(device, c, b, SLICE_SECONDS)
    result["launched_at_once"] = eager(device, c, b, 1e3)
    print(json.dumps(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
