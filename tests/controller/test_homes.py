"""Homes by the size of weights, as config.json tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism.config import Config
from prism.controller.main import catalog_of
from prism.controller.placement import first_homes

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "torch_dtype": "bfloat16",
}


def homes_of(config: Config) -> dict[str, str]:
    catalog = catalog_of(config)
    homes = first_homes(catalog.models, catalog.devices)
    return {str(model): each[0].worker for model, each in homes.items()}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A configured model of so many layers."""

    def model(name: str, layers: int, quantization: str = "none", **fields: Any) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
        return {"name": name, "path": str(tmp_path / name), "quantization": quantization} | fields

    return model


def test_nobody_lives_where_a_pinned_model_leaves_no_room(model: Callable[..., dict[str, Any]]) -> None:
    """Homes went by sizes alone, and the first requests for such a model got 503."""
    models = [model("a", 2, pinned=True, memory={"floor": "900MiB"}), model("b", 20), model("c", 20)]
    config = {"models": models, "devices": [{"memory": "1GiB"}, {"memory": "1GiB"}]}
    homes = homes_of(Config.model_validate(config))
    assert homes["a"] != homes["b"] == homes["c"]
    del models[0]["pinned"]
    homes = homes_of(Config.model_validate(config))
    assert homes["b"] != homes["c"]


def test_quantised_models_count_as_what_they_take(model: Callable[..., dict[str, Any]]) -> None:
    """11 layers in fp8 take less than 8 in bf16, so they are placed last."""
    models = [model("a", 10), model("b", 11, "fp8"), model("c", 8)]
    config = Config.model_validate({"models": models, "devices": [{"memory": "1GiB"}, {"memory": "1GiB"}]})
    assert homes_of(config) == {"a": "worker-0", "b": "worker-1", "c": "worker-1"}
    plain = [each | {"quantization": "none"} for each in models]
    config = Config.model_validate({"models": plain, "devices": [{"memory": "1GiB"}, {"memory": "1GiB"}]})
    assert homes_of(config) == {"a": "worker-1", "b": "worker-0", "c": "worker-1"}
