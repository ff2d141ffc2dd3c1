"""Prism's engine on one GPU: decode steps, first tokens, offline throughput, models side by side.

Usage: scripts/bench engine [--only decode,draws,ttft,offline,busy,together,processes] [--shapes 8b,1b]
                            [--output results.json] [...]
Weights and prompts are random. A floor is the bytes that a step reads over the bandwidth of a device copy.
Garbage is not looked for while steps run, as in a worker.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from figures import CONTEXT, copy_bandwidth, decode, first_token
from llama import SHAPES
from local import LocalModel, drive, open_device, pool_memory, prompt

from prism.engine.engine import Drawn
from prism.engine.gpu.runner import GpuRunner
from prism.types import Bytes, GiB
from prism.worker import garbage
from prism.worker.device import Device

ALONE = {"decode", "draws", "ttft", "offline", "busy"}
KV_GIB = {"8b": 80, "1b": 20}
"""Unless 40 GiB of the pool would not be left."""
Report = Callable[[str, dict[str, Any]], None]
DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
)


def fitting(model: LocalModel, batches: tuple[int, ...], steps: int = 128) -> list[int]:
    """Batches that are no larger than a step, and whose contexts fit the model's KV, all at a time."""
    kv, blocks = model.engine.kv, model.profile.kv.num_blocks(CONTEXT + steps)
    most = min(model.engine.scheduler.max_batch_size, (kv.num_free + kv.num_cached) // blocks)
    for batch in batches:
        if batch > most:
            print(f"{model.name}: no batch of {batch}, {most} at most", flush=True)
    return [batch for batch in batches if batch <= most]


def offline(
    model: LocalModel, budget: int, first: int = 0, count: int = 1000, inputs: int = 512, outputs: int = 256
) -> dict[str, Any]:
    """Output tokens a second of `count` requests that are all there at the start.

    Their prompts are those from the `first` on, their steps have `budget` tokens at most.
    """
    for i in range(count):
        model.add(f"o{i}", prompt(10_000 + first + i, inputs), outputs)
    driven = drive([model], budget)
    return {
        "requests": count,
        "output_tok_s": round(count * outputs / driven.wall_s, 1),
        "steps": driven.steps,
        "host_ms_per_step": round(driven.host_s / driven.steps * 1e3, 3),
        "host_share": round(driven.host_s / driven.wall_s, 3),
    }


def busy_share(model: LocalModel) -> dict[str, Any]:
    """Share of the time in which a step is on the device, over an offline run, by events around each step.

    Gaps between the kernels of a step are not seen. Under a profiler the nodes of a CUDA graph take longer,
    which shows up as 3 (1B) to 8 % (8B) of idle time that is not there without it.
    """
    for i in range(600):
        model.add(f"b{i}", prompt(i, 512), 256)
    assert isinstance(model.runner, GpuRunner)
    stream = model.runner.lane.stream
    marks: list[tuple[Any, Any]] = []

    def around(launch: Callable[[], Any]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record(stream)
        launch()
        end.record(stream)
        marks.append((begin, end))

    drive([model], around=around)
    torch.cuda.synchronize()
    span = marks[0][0].elapsed_time(marks[-1][1])
    idle = sum(max(0.0, end.elapsed_time(begin)) for (_, end), (begin, _) in pairwise(marks))
    return {"steps": len(marks), "busy_share": round(1 - idle / span, 4)}


def together(shape: str, count: int, lanes: int, folder: Path, batch: int = 4) -> dict[str, Any]:
    """`count` models decoding at once on so many lanes: tokens a second in total, gaps between tokens."""
    times = decode_together(shape, count, lanes, folder, pool_memory(100), batch)
    return {"models": f"{count} x {shape}", "lanes": lanes, "batch": batch} | overlap(times, batch)


def processes(shape: str, count: int, batch: int = 4) -> dict[str, Any]:
    """The same with a process of its own for each model, started at once; no MPS."""
    context = torch.multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    memory = Bytes(pool_memory(100) // count)
    workers = [
        context.Process(target=one_process, args=(shape, memory, batch, barrier, results))
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    times = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return {"models": f"{count} x {shape}", "processes": count, "batch": batch} | overlap(times, batch)


def one_process(shape: str, memory: Bytes, batch: int, barrier: Any, results: Any) -> None:
    """One of them; the clock is the machine's, so times can be compared."""
    with tempfile.TemporaryDirectory() as name:
        results.put(decode_together(shape, 1, 1, Path(name), memory, batch, barrier.wait)[0])


def overlap(times: list[list[float]], batch: int) -> dict[str, Any]:
    """Tokens a second and gaps while all of them decode."""
    begin, end = max(t[10] for t in times), min(t[-1] for t in times)
    gaps = sorted(b - a for t in times for a, b in pairwise(t) if begin <= a and b <= end)
    return {
        "tok_s": round(len(gaps) * batch / (end - begin), 1),
        "gap_p50_ms": round(gaps[len(gaps) // 2] * 1e3, 2),
        "gap_p99_ms": round(gaps[int(len(gaps) * 0.99)] * 1e3, 2),
    }


def decode_together(
    shape: str,
    count: int,
    lanes: int,
    folder: Path,
    memory: Bytes,
    batch: int,
    ready: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Times at which each model's tokens came."""
    device = open_device(memory, lanes=lanes, batch=64)
    models = [LocalModel(device, shape, f"{shape}-{i}", folder, 4, 64) for i in range(count)]
    garbage.take_over()
    times: dict[int, list[float]] = {}

    def note(model: LocalModel, drawn: Drawn, now: float) -> None:
        if len(drawn) == batch:
            times[id(model)].append(now)

    for turn in ("warm", "again", "timed"):
        times.update({id(model): [] for model in models})
        for model in models:
            for i in range(batch):
                model.add(f"{turn}{i}", prompt(i, CONTEXT), 400)
        if turn == "timed":
            ready()
        drive(models, on_drawn=note)
        models[0].settle()
    return list(times.values())


def alone(shape: str, device: Device, folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Figures of one model with nobody beside it."""
    bandwidth, wanted = options.bandwidth, options.only
    room = device.pool.num_slabs * device.slab_bytes // GiB - 40
    kv = min(KV_GIB[shape], room) if options.kv is None else options.kv
    model = LocalModel(device, shape, shape, folder, kv, options.batch)
    for batch in fitting(model, (1, 8, 64, 512)) if "decode" in wanted else ():
        decode(model, batch, bandwidth)
        model.settle()
        report(f"decode_{shape}", decode(model, batch, bandwidth))
    for batch in fitting(model, (1, 64)) if "draws" in wanted else ():
        for params in DRAWS:
            report(f"draws_{shape}", params | decode(model, batch, bandwidth, **params))
    for length in (512, 4000) if "ttft" in wanted else ():
        report(f"ttft_{shape}", first_token(model, length))
    if "offline" in wanted:
        # always other prompts: the cache finds none of them
        offline(model, options.tokens, first=900_000, count=options.batch + 100)
        model.settle()
        for i in range(options.repeats):
            report(f"offline_{shape}", offline(model, options.tokens, first=1000 * i))
    if "busy" in wanted:
        report(f"busy_{shape}", busy_share(model))


def parsed() -> argparse.Namespace:
    """Options, `only` and `shapes` as lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="decode,ttft,offline,busy")
    parser.add_argument("--shapes", default="8b,1b")
    parser.add_argument("--output", type=Path)
    one = parser.add_argument_group("one model alone (decode, draws, ttft, offline, busy)")
    one.add_argument("--repeats", type=int, default=1, help="of `offline`, with other prompts each time")
    one.add_argument("--batch", type=int, default=512, help="sequences of a step")
    one.add_argument("--tokens", type=int, default=8192, help="tokens of a step in `offline`")
    one.add_argument("--kv", type=float, help="GiB of KV; by default 80 (8b) and 20 (1b)")
    more = parser.add_argument_group("several of one shape (together, processes)")
    more.add_argument("--count", type=int, default=2)
    more.add_argument("--lanes", type=int, default=2, help="of `together`")
    options = parser.parse_args()
    options.only, options.shapes = options.only.split(","), options.shapes.split(",")
    if unknown := set(options.only) - ALONE - {"together", "processes"}:
        parser.error(f"--only: nothing is called {', '.join(sorted(unknown))}")
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"--shapes: nothing is called {', '.join(sorted(unknown))}")
    if set(options.only) - ALONE and len(options.shapes) != 1:
        parser.error("--shapes: together and processes take one")
    if options.kv is not None and options.kv <= 0:
        parser.error("--kv: must be more than 0")
    return options


def main() -> None:
    """Prints one line a figure, and all of them as JSON."""
    options = parsed()
    options.bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_s": round(options.bandwidth / 1e12, 3),
    }

    def report(name: str, value: dict[str, Any]) -> None:
        results.setdefault(name, []).append(value)
        print(name, json.dumps(value), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(options.only) & ALONE:
            device = open_device(pool_memory(124), batch=options.batch, tokens=options.tokens)
            garbage.take_over()
            for shape in options.shapes:
                alone(shape, device, folder, options, report)
        if "processes" in options.only:
            report("processes", processes(options.shapes[0], options.count))
        if "together" in options.only:
            report("together", together(options.shapes[0], options.count, options.lanes, folder))
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
