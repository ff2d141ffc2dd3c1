"""Sizes of the demo, from the models as they lie on disk: a device on which not everything fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import yaml

from prism.demo.catalog import demo_model_path, golden_answers
from prism.demo.tasks import TASKS
from prism.modelspec import read_spec
from prism.types import Bytes, MiB

SLAB = Bytes(2 * MiB)
KV_SLABS_PER_MODEL = 2
"""Room for KV beside the weights of all models; the burst wants more than all of it."""
OVERLOAD = 1.3
"""KV of a burst over what is left when its model is alone: the burst must get everything."""


class ModelSize(NamedTuple):
    """What a model takes of the device."""

    name: str
    weight_slabs: int
    chat_bytes: Bytes
    """KV of one golden conversation, on average."""


@dataclass(frozen=True)
class Plan:
    """The device and the burst."""

    models: tuple[ModelSize, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All models."""
        return tuple(model.name for model in self.models)

    @property
    def weight_slabs(self) -> int:
        """Slabs that hold the weights of all models."""
        return sum(model.weight_slabs for model in self.models)

    @property
    def num_slabs(self) -> int:
        """Slabs of the device."""
        return self.weight_slabs + KV_SLABS_PER_MODEL * len(self.models)

    @property
    def memory(self) -> Bytes:
        """Physical memory of the device."""
        return Bytes(self.num_slabs * SLAB)

    @property
    def bursting(self) -> ModelSize:
        """The model whose chats need the most KV."""
        return max(self.models, key=lambda model: model.chat_bytes)

    @property
    def others(self) -> tuple[str, ...]:
        """All models but the bursting one."""
        return tuple(name for name in self.names if name != self.bursting.name)

    @property
    def burst_chats(self) -> int:
        """Chats at once whose KV is more than the device holds beside the bursting model's weights."""
        room = (self.num_slabs - self.bursting.weight_slabs) * SLAB
        return round(OVERLOAD * room / self.bursting.chat_bytes)


def make_plan() -> Plan:
    """The plan for all models of the catalog."""
    return Plan(tuple(_size(task.name) for task in TASKS))


def _size(name: str) -> ModelSize:
    path = demo_model_path(name)
    spec = read_spec(path)
    rotary = spec.max_position * spec.position_bytes  # lies behind the weights, in fp32
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors")) + rotary
    tokens = mean(golden.num_prompt_tokens + len(golden.token_ids) for golden in golden_answers(name))
    return ModelSize(name, -(-weights // SLAB), Bytes(round(tokens * spec.kv_bytes_per_token)))


def write_config(plan: Plan, path: Path, port: int, admin_port: int) -> None:
    """A configuration for `prism serve`."""
    config = {
        "models": [{"name": name, "path": str(demo_model_path(name))} for name in plan.names],
        # one thread: the models are so small that two only wait for one another
        "devices": [{"kind": "cpu", "memory": int(plan.memory), "slab": int(SLAB), "threads": 1}],
        "server": {"port": port, "admin_port": admin_port, "shutdown_grace": "5s"},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
