"""Small checkpoints and sources for the tests of this folder, and slabs that packed weights are copied to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from prism.types import Address, Bytes, MiB, ModelId, Quantization
from prism.weights.client import PackedWeights
from prism.weights.copiers import Copier, HostCopier
from prism.weights.link import Traffic
from prism.weights.places import Places
from prism.weights.protocol import WeightSource
from prism.weights.transfers import Transfer

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


SLAB = Bytes(2 * MiB)
"""Half a checksum's chunk."""


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


class Slabs:
    """Slabs in no order, each with another one's worth of room behind it that nothing may touch."""

    def __init__(self, packed: PackedWeights, slab_bytes: Bytes = SLAB, device: str = "cpu") -> None:
        count = -(-packed.total_bytes // slab_bytes)
        self.total, self.slab_bytes = packed.total_bytes, slab_bytes
        self.order = [int(i) for i in np.random.default_rng(0).permutation(count)]
        self.memory = torch.zeros((count, 2, slab_bytes), dtype=torch.uint8, device=device)

    @property
    def places(self) -> Places:
        base = self.memory.data_ptr()
        return Places(tuple(Address(base + 2 * self.slab_bytes * i) for i in self.order), self.slab_bytes)

    def content(self) -> np.ndarray:
        host = self.memory.cpu()
        assert not host[:, 1].any(), "written past a slab"
        flat = host[self.order, 0].reshape(-1)
        assert not flat[self.total :].any(), "written past the end"
        return flat[: self.total].numpy()


def carry(transfer: Transfer, copier: Copier | None = None) -> Transfer:
    """Until it has ended."""
    traffic = Traffic(copier or HostCopier())
    traffic.add(transfer)
    while traffic.step():
        pass
    assert transfer.has_ended.is_set()
    return transfer
