"""Models with fp8 weights through a whole worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel

from prism.types import ModelId
from tests.support.checkpoints import FAMILIES, fake_quantise, make_model, prompts, reference, save
from tests.support.local_worker import SLAB, LocalWorker

FP8: dict[str, Any] = {"quantization": "fp8"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """Saved as they were; as a reference, what fp8 leaves of them."""
    folder = tmp_path_factory.mktemp("models")
    made = {family: make_model(family, seed=i) for i, family in enumerate(FAMILIES)}
    paths = {family: save(model, folder / family) for family, model in made.items()}
    return {family: (fake_quantise(model), paths[family]) for family, model in made.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_the_quantised_model(family: str, models: dict) -> None:
    model, path = models[family]
    local = LocalWorker({family: path, "plain": path}, 16, model_options={family: FP8}, max_batch_tokens=48)
    many = prompts(6, 100)
    for i, prompt in enumerate(many):
        local.submit(str(i), family, prompt)
        local.submit(f"plain{i}", "plain", prompt)
    local.run()
    expected = [reference(model, prompt, 64) for prompt in many]
    assert [local.outbox.tokens[str(i), 0] for i in range(6)] == expected
    assert [local.outbox.tokens[f"plain{i}", 0] for i in range(6)] != expected
    local.close()


def test_evicted_models_return(models: dict) -> None:
    """Room for both models' weights, but not for any KV: each turn brings one back."""
    names = ("llama", "qwen2")
    local = LocalWorker({name: models[name][1] for name in names}, 2, model_options=dict.fromkeys(names, FP8))
    for turn in range(3):
        for name in names:
            prompt = prompts(1, 60, seed=turn)[0]
            local.submit(f"{name}{turn}", name, prompt, max_tokens=20)
            local.run()
            local.poison()
            assert local.outbox.tokens[f"{name}{turn}", 0] == reference(models[name][0], prompt, 20)
    assert min(local.worker.models[ModelId(name)].num_evictions for name in names) >= 2
    local.close()


def test_sizes_and_costs(tmp_path: Path) -> None:
    """Fewer slabs of weights; as much to compute."""
    path = save(make_model("llama", intermediate_size=2048, num_hidden_layers=8), tmp_path)
    local = LocalWorker({"half": path, "whole": path}, 16, model_options={"half": FP8})
    for name in ("half", "whole"):
        local.submit(name, name, [1, 2, 3], max_tokens=2)
    local.run()
    half, whole = (local.worker.models[ModelId(name)].profile for name in ("half", "whole"))
    assert half is not None and whole is not None
    assert half.weights.num_parameters == whole.weights.num_parameters and half.kv == whole.kv
    matrices = 8 * (64 * 64 * 3 + 3 * 64 * 2048)
    others = whole.weights.total_bytes - 4 * matrices
    assert half.weights.total_bytes == pytest.approx(matrices + others, rel=0.05)
    assert whole.weight_slabs == -(-(4 * matrices + others + 512 * 16 * 4) // SLAB)
    assert half.weight_slabs < whole.weight_slabs / 2
    local.close()


def test_a_flipped_bit_is_noticed(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = np.copyto

    def flip_behind(to: np.ndarray, source: np.ndarray) -> None:
        copy(to, source)
        to[len(to) // 2] ^= 1

    local = LocalWorker({"llama": models["llama"][1]}, 8, model_options={"llama": FP8})
    monkeypatch.setattr(np, "copyto", flip_behind)
    local.submit("r", "llama", [1, 2, 3])
    local.run()
    assert "arrived damaged" in local.outbox.rejected["r"].error.message
    local.close()


def test_a_slow_path_says_so_once(models: dict, caplog: pytest.LogCaptureFixture) -> None:
    names = ("llama", "qwen2", "qwen3")
    options = {"llama": FP8, "qwen2": FP8}
    local = LocalWorker({name: models[name][1] for name in names}, 8, model_options=options)
    with caplog.at_level(logging.WARNING):
        for name in names:
            local.submit(name, name, [1, 2, 3], max_tokens=2)
        local.run()
    said = [record.message for record in caplog.records if "fp8" in record.message]
    assert len(said) == 1 and said[0].endswith("which is slow: CPUs have no products of fp8")
    local.close()
