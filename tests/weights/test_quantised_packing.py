"""What the packer makes of a checkpoint in fp8 is what torch makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prism.errors import CheckpointError
from prism.types import DType, Quantization
from prism.weights import pieces
from prism.weights.client import PackedWeights, pack_here
from prism.weights.layout import Layout
from prism.weights.packer import plan_source
from prism.weights.views import view_weights
from tests.support import checkpoints
from tests.weights.support import checkpoint_source, dummy_source, rewrite, state_of

CPU = torch.device("cpu")
TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def assert_packed(packed: PackedWeights, layout: Layout, state: dict[str, torch.Tensor]) -> None:
    """Matrices of layers are quantised from the checkpoint's own numbers, everything else is as ever."""
    views = view_weights(layout, packed.address, CPU)
    assert len(layout.scales) >= 4
    for entry in layout.entries:
        if not entry.sources:
            continue
        matrix = torch.cat([state[source.name] for source in entry.sources])
        if entry.name not in layout.scales:
            assert torch.equal(views[entry.name], matrix.to(TORCH[entry.dtype])), entry.name
            continue
        values, scales = checkpoints.quantised(matrix)
        assert torch.equal(views[entry.name].view(torch.uint8), values.view(torch.uint8)), entry.name
        assert torch.equal(views[f"{entry.name}_scale"], scales), entry.name


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
@pytest.mark.parametrize("stored", list(TORCH.values()))
def test_families_and_formats(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model(family).to(stored), tmp_path)
    source = checkpoint_source(tmp_path, quantization="fp8")
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))


def test_the_model_may_compute_in_another_format_than_the_checkpoints(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model("qwen2"), tmp_path)
    source = checkpoint_source(tmp_path, dtype="bf16", quantization="fp8")
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))


def test_shards_and_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.make_model("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    source = checkpoint_source(tmp_path, quantization="fp8")
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))


def test_rows_of_zeros(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model("llama"), tmp_path)
    state = state_of(tmp_path)
    state["model.layers.1.self_attn.k_proj.weight"][3] = 0
    rewrite(tmp_path, state)
    source = checkpoint_source(tmp_path, quantization="fp8")
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state)
        views = view_weights(plan_source(source), packed.address, CPU)
        assert views["layers.1.qkv_scale"][64 + 3] == 1


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_the_reason_names_file_tensor_and_row(number: float, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model("llama"), tmp_path)
    state = state_of(tmp_path)
    state["model.layers.2.mlp.up_proj.weight"][5, 60] = number
    rewrite(tmp_path, state)
    with pack_here(checkpoint_source(tmp_path)):
        pass  # unquantised, it is the model's own business
    problem = "model.layers.2.mlp.up_proj.weight: row 5 has a number that is not finite"
    with pytest.raises(CheckpointError, match=problem) as caught:
        pack_here(checkpoint_source(tmp_path, quantization="fp8"))
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_random_weights_are_those_of_the_unquantised_model_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def views(quantization: Quantization) -> dict[str, torch.Tensor]:
        source = dummy_source(tmp_path, quantization=quantization)
        layout = plan_source(source)
        with pack_here(source) as packed:
            return {name: t.clone() for name, t in view_weights(layout, packed.address, CPU).items()}

    plain, whole = views("none"), views("fp8")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    pieced = views("fp8")
    for name, tensor in whole.items():
        bits = tensor.view(torch.uint8)
        assert torch.equal(bits, pieced[name].view(torch.uint8)), name
        if name.endswith("_scale"):
            continue
        if f"{name}_scale" not in whole:
            assert torch.equal(tensor, plain[name]), name
            continue
        values, scales = checkpoints.quantised(plain[name])
        assert torch.equal(bits, values.view(torch.uint8)) and torch.equal(whole[f"{name}_scale"], scales), (
            name
        )
