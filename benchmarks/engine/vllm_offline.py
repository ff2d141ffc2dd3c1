"""The same figures of vLLM, by its own class `LLM`: decode steps, first tokens, offline throughput.

Usage: python benchmarks/engine/vllm_offline.py --shape 8b|1b [--only ttft,decode,offline] [--repeats 3]
                                                [--output results.json]
Needs an environment with vLLM; nothing of Prism is used. Weights and prompts are random. The prefix cache is
off, as no prompt comes twice; the rest are vLLM's defaults.

- First tokens: wall time of `generate` for one prompt and one token; the median of five.
- Decode steps: a run of 128 output tokens behind 1,024 prompt tokens, less the median run of 16, by the 112
  steps between them, which have no prompts; the median of five.
- Offline: wall time of `generate` for 1,000 prompts of 512 tokens and 256 output tokens each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import SHAPES

LONG, SHORT = 128, 16


def processor() -> str:
    """What the host says of itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else os.uname().machine}"


def fill(model: Any) -> None:
    """Random weights as ours are, in the engine's process: vLLM's dummies are within a thousandth."""
    with torch.inference_mode():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


class Bench:
    """An engine, and prompts that none of its runs has had before."""

    def __init__(self, shape: str, folder: Path, seed: int) -> None:
        vllm: Any = import_module("vllm")
        (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
        begin = time.perf_counter()
        self._llm = vllm.LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
        )
        self.start_s = time.perf_counter() - begin
        self._llm.apply_model(fill)
        self._params = vllm.SamplingParams
        self._random = np.random.default_rng(seed)
        self.version = vllm.__version__

    def about(self) -> dict[str, Any]:
        """What decides how fast it is."""
        config = self._llm.llm_engine.vllm_config
        return {
            "vllm": self.version,
            "gpu": torch.cuda.get_device_name(),
            "host": processor(),
            "start_s": round(self.start_s, 1),
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "kv_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "cudagraph_mode": config.compilation_config.cudagraph_mode.name,
        }

    def run(self, count: int, inputs: int, outputs: int) -> float:
        """Seconds for so many prompts, greedy."""
        prompts = [
            {"prompt_token_ids": self._random.integers(0, 128000, inputs).tolist()} for _ in range(count)
        ]
        params = self._params(temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        results = self._llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - begin
        lengths = [len(result.outputs[0].token_ids) for result in results]
        if lengths != [outputs] * count:
            raise SystemExit(f"asked for {count} times {outputs} tokens, got {sorted(set(lengths))}")
        return taken

    def ttft(self) -> dict[str, Any]:
        """Milliseconds to the first token of one prompt."""
        figures = {}
        for inputs in (512, 4000):
            times = [self.run(1, inputs, 1) for _ in range(7)][2:]
            figures[f"ttft_{inputs}_ms"] = round(statistics.median(times) * 1e3, 3)
        return figures

    def decode(self) -> dict[str, Any]:
        """Milliseconds of a step, and those of each run."""
        figures: dict[str, Any] = {}
        for batch in (1, 64):
            self.run(batch, 1024, SHORT)
            short = statistics.median(self.run(batch, 1024, SHORT) for _ in range(3))
            steps = [(self.run(batch, 1024, LONG) - short) / (LONG - SHORT) for _ in range(5)]
            figures[f"decode_step_b{batch}_ms"] = round(statistics.median(steps) * 1e3, 3)
            figures[f"decode_step_b{batch}_all_ms"] = [round(step * 1e3, 3) for step in steps]
        return figures

    def offline(self, repeats: int) -> dict[str, Any]:
        """Seconds of each run, and the median's output tokens a second."""
        self.run(64, 512, SHORT)
        times = [self.run(1000, 512, 256) for _ in range(repeats)]
        return {
            "offline_s": [round(seconds, 3) for seconds in times],
            "offline_output_tok_s": round(1000 * 256 / statistics.median(times), 1),
        }


def main() -> None:
    """Prints the figures as JSON, and writes them after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--only", default="ttft,decode,offline")
    parser.add_argument("--repeats", type=int, default=3, help="of `offline`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - {"ttft", "decode", "offline"}:
        parser.error(f"--only: nothing is called {', '.join(sorted(unknown))}")
    # `apply_model` sends a function to the engine's process
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options.shape, Path(name), options.seed)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "ttft": bench.ttft,
            "decode": bench.decode,
            "offline": partial(bench.offline, options.repeats),
        }
        results: dict[str, Any] = {"shape": options.shape} | bench.about()
        for part in wanted:
            results |= parts[part]()
            print(json.dumps(results), flush=True)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
