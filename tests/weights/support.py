"""Small checkpoints and sources for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from prism.types import ModelId, Quantization
from prism.weights.protocol import WeightSource

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
}


def write_config(directory: Path, **overrides: object) -> Path:
    """A directory with a config.json and no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | overrides))
    return directory


def dummy_source(
    directory: Path, name: str = "m", quantization: Quantization = "none", **overrides: object
) -> WeightSource:
    """Random weights of a small model."""
    path = write_config(directory / name, **overrides)
    return WeightSource(model=ModelId(name), path=str(path), load_format="dummy", quantization=quantization)


def checkpoint_source(
    directory: Path, name: str = "m", dtype: str = "auto", quantization: Quantization = "none"
) -> WeightSource:
    """The checkpoint in `directory`."""
    return WeightSource(model=ModelId(name), path=str(directory), dtype=dtype, quantization=quantization)


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, as the safetensors library reads them."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


def rewrite(directory: Path, state: dict[str, torch.Tensor]) -> None:
    """Replace a single-file checkpoint's tensors."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
