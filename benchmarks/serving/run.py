"""One model through the whole server on one NVIDIA GPU: decodes, and many requests at once, all streams.

Usage: scripts/bench serving [--shapes 8b,1b] [--gateways 1,4] [--batches 1,8,64] [--output results.json]
       [--batch 256] [--tokens 2048] [--requests 1000] [--rehearse]

The counterpart of ../engine: the same shapes and lengths, with gateway, worker, messages and HTTP in between.
The client is that of `prism bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from prism.bench.outcomes import Record
from prism.bench.replay import Replay
from prism.bench.targets import Defaults, Target, make_targets
from prism.bench.wire import Style, encode_all
from prism.bench.workload import Planned

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from running import gpu_name, is_healthy, running
from shapes import write_shape

PORT, ADMIN = 8370, 8371
SHAPES = {"8b": ("llama-3-8b", "60GiB"), "1b": ("llama-3.2-1b", "60GiB"), "rehearsal": ("rehearsal", "2GiB")}
"""With the memory of the device: KV for more sequences than a step takes."""
TOKEN_IDS = (10, 100_000)


def write_config(shape: str, gateways: int, folder: Path, steps: dict[str, int]) -> Path:
    """One model, named `m`."""
    name, memory = SHAPES[shape]
    write_shape(name, folder)
    device: dict[str, Any] = {"kind": "cuda", "memory": memory, "slab": "32MiB"}
    if shape == "rehearsal":
        device = {"kind": "cpu", "threads": 1, "memory": memory}
    path = folder / "prism.yaml"
    settings = {
        "models": [{"name": "m", "path": str(folder / name), "load_format": "dummy", "preload": True}],
        "devices": [device | steps],
        "server": {"port": PORT, "admin_port": ADMIN, "gateways": gateways},
        "limits": {"max_wait": 300},
    }
    path.write_text(json.dumps(settings))
    return path


async def send(count: int, prompt: int, output: int, seed: int) -> tuple[list[Record], float]:
    """So many requests at once; what became of them, and the seconds that all took."""
    target: Target = make_targets(["m"], None, Defaults(f"http://127.0.0.1:{PORT}", "/v1/completions"))["m"]
    planned = [Planned(i, 0.0, target, prompt, output) for i in range(count)]
    bodies = encode_all(planned, Style(temperature=0.0, token_ids=TOKEN_IDS), seed)
    run = await Replay(planned, bodies, timeout=300).run()
    failed = [record.outcome for record in run.records if not record.is_finished]
    if failed:
        raise SystemExit(f"{len(failed)} requests failed, the first: {failed[0]}")
    return run.records, run.duration


def steady_step(records: list[Record]) -> dict[str, Any]:
    """From when the last stream has begun to when the first one ends, all of them decode: a piece is a token.

    Gaps are those of that time, too.
    """
    begin = max(record.times[0] for record in records)
    end = min(record.times[-1] for record in records)
    pairs = [pair for record in records for pair in pairwise(record.times)]
    gaps = sorted(after - before for before, after in pairs if begin <= before and after <= end)
    if not gaps:
        raise SystemExit(f"{len(records)} streams never decode all at a time: more than --batch?")
    ended = sum(begin < at <= end for record in records for at in record.times)
    return {
        "batch": len(records),
        "step_ms": round(1000 * (end - begin) * len(records) / ended, 3),
        "gap_p50_ms": round(1000 * gaps[len(gaps) // 2], 3),
        "gap_p99_ms": round(1000 * gaps[int(0.99 * len(gaps))], 3),
    }


async def measure(batches: list[int], requests: int, scale: int) -> dict[str, Any]:
    """All figures of one server."""
    result: dict[str, Any] = {}
    for seed, batch in enumerate(batches):
        output = 256 if batch < 64 else 768
        await send(batch, 1024 // scale, 64, 100 + seed)  # graphs and kernels
        records, _ = await send(batch, 1024 // scale, output // max(1, scale // 4), seed)
        result[f"decode_{batch}"] = steady_step(records)
    if requests:
        await send(min(600, requests), 512 // scale, 40, 50)
        records, seconds = await send(requests, 512 // scale, 256 // scale, 60)
        tokens = sum(record.output_tokens for record in records)
        result["offline"] = {
            "requests": requests,
            "output_tok_s": round(tokens / seconds),
            "seconds": round(seconds, 2),
            "pieces": sum(len(record.times) for record in records),
        }
        firsts = sorted(record.ttft for record in records)
        result["offline"]["ttft_p50_s"] = round(firsts[len(firsts) // 2], 3)
    return result


def one_server(shape: str, gateways: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start, measure, stop."""
    steps = {"max_batch_size": options.batch, "max_batch_tokens": options.tokens}
    scale = 16 if shape == "rehearsal" else 1
    with running(write_config(shape, gateways, folder, steps), folder / "log") as server:
        server.wait_for(lambda: is_healthy(PORT), 120)
        asyncio.run(send(1, 64, 2, 999))
        return asyncio.run(measure(options.batches, options.requests, scale))


def main() -> None:
    """Prints one line for each server, and writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="8b,1b", type=lambda text: text.split(","))
    parser.add_argument("--gateways", default="1", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument(
        "--batches",
        default="1,8,64",
        type=lambda text: [int(n) for n in text.split(",") if n],
        help="numbers of streams that decode together",
    )
    parser.add_argument("--batch", type=int, default=256, help="sequences of a step at most")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step at most")
    parser.add_argument("--requests", type=int, default=1000, help="of 512 tokens in, 256 out, all at once")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="a tiny shape on the CPU: tests this script")
    options = parser.parse_args()
    results = []
    for shape in ["rehearsal"] if options.rehearse else options.shapes:
        for gateways in options.gateways:
            with tempfile.TemporaryDirectory() as name:
                measured = one_server(shape, gateways, options, Path(name))
            results.append({"gpu": gpu_name(), "shape": shape, "gateways": gateways, **measured})
            print(json.dumps(results[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
