"""fp8 weights beside bf16 on one GPU: logits against fp32, decode steps, first tokens, activation.

Usage: scripts/bench fp8 [--only logits,steps,activation] [--shapes 8b,1b] [--output results.json]
Weights and prompts are random, and the same for both.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from activation import activation
from logits import compare, ours, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from figures import copy_bandwidth, decode, first_token
from local import LocalModel, open_device

from prism.types import Bytes, GiB, Quantization
from prism.worker.device import Device

KINDS: tuple[Quantization, ...] = ("none", "fp8")
TOKENS, ONE_BY_ONE = 700, 100


def logits(device: Device, shape: str, folder: Path) -> dict[str, Any]:
    """All against fp32: tokens in chunks, whose activations go through fp8 too, and tokens one by one.

    `weights` is transformers in fp32 over the quantised weights: what quantising weights alone changes.
    """
    prompt = torch.randint(0, 128000, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = [100] * ((TOKENS - ONE_BY_ONE) // 100) + [1] * ONE_BY_ONE
    results: dict[str, Any] = {}
    parts = {"chunks": slice(0, TOKENS - ONE_BY_ONE), "one_by_one": slice(TOKENS - ONE_BY_ONE, None)}
    exact: torch.Tensor | None = None
    for kind in KINDS:
        model = LocalModel(device, shape, f"{shape}-{kind}-logits", folder, 1, 64, kind)
        theirs = reference(model, shape, prompt)
        gc.collect()
        torch.cuda.empty_cache()
        exact = theirs if exact is None else exact
        mine = ours(model, prompt, sizes)
        assert bool(torch.isfinite(mine).all())
        results[kind] = {name: compare(mine[part], exact[part]) for name, part in parts.items()}
        if kind == "fp8":
            results["weights"] = {name: compare(theirs[part], exact[part]) for name, part in parts.items()}
        model.close()
    return results


def steps(device: Device, shape: str, bandwidth: float, folder: Path) -> dict[str, Any]:
    """Decode steps and first tokens of both."""
    results: dict[str, Any] = {}
    models = {
        kind: LocalModel(device, shape, f"{shape}-{kind}-steps", folder, 16, 64, kind) for kind in KINDS
    }
    for kind, model in models.items():
        found: dict[str, Any] = {"weights_gb": round(model.profile.weights.total_bytes / 1e9, 3)}
        for batch in (1, 8, 64):
            decode(model, batch, bandwidth, 64)
            found[f"decode_{batch}"] = decode(model, batch, bandwidth)
        for length in (512, 4000):
            found[f"prompt_{length}"] = first_token(model, length)
        results[kind] = found
    for model in models.values():
        model.close()
    return results


def main() -> None:
    """Prints one line a figure, and all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="logits,steps,activation")
    parser.add_argument("--shapes", default="1b,8b")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    wanted = options.only.split(",")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_s": round(bandwidth / 1e12, 3),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in options.shapes.split(","):
            device = open_device(Bytes(60 * GiB), batch=64)  # anew: graphs hold addresses of models that end
            torch.cuda.set_per_process_memory_fraction(1.0)  # the reference lies beside the pool
            if "logits" in wanted:
                results[f"logits_{shape}"] = logits(device, shape, folder)
                print(f"logits_{shape}", json.dumps(results[f"logits_{shape}"]), flush=True)
            if "steps" in wanted:
                results[f"steps_{shape}"] = steps(device, shape, bandwidth, folder)
                print(f"steps_{shape}", json.dumps(results[f"steps_{shape}"]), flush=True)
            if "activation" in wanted:
                results[f"activation_{shape}"] = {k: activation(device, shape, k, folder) for k in KINDS}
                print(f"activation_{shape}", json.dumps(results[f"activation_{shape}"]), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            device.close()
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
