"""A profile of a GPU: steps are asynchronous, decodes are graphs, weights come from registered memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism.calibration.calibrate import run_profile
from prism.config import Config
from prism.profile import read_profile
from tests.support.checkpoints import make_model, save

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 12,
}


def test_a_gpu_is_measured(tmp_path: Path) -> None:
    model = make_model("llama", max_position_embeddings=4096, head_dim=64, **SHAPE).bfloat16()
    path = save(model, tmp_path / "llama")
    device = {"kind": "cuda", "memory": 12 << 30, "slab": 2 << 20, "lanes": 4, "max_batch_size": 64}
    config = Config.model_validate({"models": [{"name": "m", "path": str(path)}], "devices": [device]})
    said: list[str] = []
    assert run_profile(config, 0, tmp_path / "p.json", said.append) == 0
    assert not any("left out" in line for line in said), said
    profile = read_profile(tmp_path / "p.json")
    steps = profile.costs("m").steps
    assert 1e-5 < steps.decode(1, 16) < steps.decode(64, 64 * 1024) < 0.1
    assert steps.decode(16, 0) < steps.prefill(16) < steps.prefill(2048) < 1, "prompts have no graphs"
    assert set(profile.device.overlap) == {2, 4}
    assert 1.05 < profile.device.overlap[2] < 2.5  # such small steps do not fill a GPU
    assert profile.models["m"].load.bandwidth > 1e9
