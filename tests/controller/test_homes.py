"""Homes by the size of weights, as config.json tells it."""

from __future__ import annotations

import json
from pathlib import Path

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


def test_quantised_models_count_as_what_they_take(tmp_path: Path) -> None:
    """11 layers in fp8 take less than 8 in bf16, so they are placed last."""

    def model(name: str, layers: int, quantization: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}))
        return {"name": name, "path": str(tmp_path / name), "quantization": quantization}

    models = [model("a", 10, "none"), model("b", 11, "fp8"), model("c", 8, "none")]
    config = Config.model_validate({"models": models, "devices": [{"memory": "1GiB"}, {"memory": "1GiB"}]})
    assert homes_of(config) == {"a": "worker-0", "b": "worker-1", "c": "worker-1"}
    plain = [each | {"quantization": "none"} for each in models]
    config = Config.model_validate({"models": plain, "devices": [{"memory": "1GiB"}, {"memory": "1GiB"}]})
    assert homes_of(config) == {"a": "worker-1", "b": "worker-0", "c": "worker-1"}
