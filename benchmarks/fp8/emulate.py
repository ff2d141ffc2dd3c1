"""What fp8 changes in logits, emulated in fp32 on a CPU: weights alone, and the rows they multiply as well.

Usage: python benchmarks/fp8/emulate.py [--tokens 256]
A random Llama-3.2-1B shape, as ../first-light/parity.py makes it. 5 GiB of memory, some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "first-light"))
from shapes import SHAPES

SHAPE = "llama-3.2-1b"


def through_fp8(rows: Tensor) -> Tensor:
    """Each row through e4m3 and back, scaled by its largest number."""
    peaks = rows.abs().amax(-1, keepdim=True)
    scales = torch.where(peaks == 0, torch.ones_like(peaks), peaks / 448)
    return (rows / scales).to(torch.float8_e4m3fn).float() * scales


def random_model() -> LlamaForCausalLM:
    """fp32 over weights that bf16 can hold."""
    shape = dict(SHAPES[SHAPE])
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    config = LlamaConfig(**shape, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16().float())
    return model


@torch.inference_mode()
def logits(model: LlamaForCausalLM, prompt: Tensor, rounding: Callable[[Tensor], Tensor] | None) -> Tensor:
    """`[tokens, vocabulary]`, with what goes into the layers' products rounded."""

    def round_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if rounding is None else (rounding(inputs[0]),)

    products = [module for name, module in model.named_modules() if name.endswith("_proj")]
    hooks = [module.register_forward_pre_hook(round_inputs) for module in products]
    result: Tensor = model(prompt).logits[0]
    for hook in hooks:
        hook.remove()
    return result


def compare(changed: Tensor, exact: Tensor) -> dict[str, Any]:
    """As run.py's."""
    chosen = changed.argmax(1)
    lost = exact.amax(1) - exact.gather(1, chosen[:, None])[:, 0]
    return {
        "relative_l2": round(float((changed - exact).norm() / exact.norm()), 4),
        "same_greedy": round(float((chosen == exact.argmax(1)).float().mean()), 3),
        "lost_deviations": round(float((lost / exact.std(1)).mean()), 4),
    }


def main() -> None:
    """Prints one line a change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    count = parser.parse_args().tokens
    prompt = torch.randint(0, 128256, (1, count), generator=torch.Generator().manual_seed(1))
    model = random_model()
    exact = logits(model, prompt, None)
    bf16 = logits(model, prompt, lambda rows: rows.bfloat16().float())
    print("bf16 rows", json.dumps(compare(bf16, exact)), flush=True)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data.copy_(through_fp8(parameter.data))
    print("fp8 weights", json.dumps(compare(logits(model, prompt, None), exact)), flush=True)
    both = logits(model, prompt, through_fp8)
    print("fp8 weights and rows", json.dumps(compare(both, exact)), flush=True)


if __name__ == "__main__":
    main()
