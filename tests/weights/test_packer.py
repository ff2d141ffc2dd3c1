"""What comes out of the packer is what transformers wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from prism.errors import CheckpointError
from prism.memory import memfd
from prism.types import DType
from prism.weights import checksum, pieces
from prism.weights.client import PackedWeights, pack_here
from prism.weights.layout import Layout
from prism.weights.packer import plan_source
from prism.weights.protocol import PackEvent, PackJob, file_bytes
from prism.weights.safetensors_index import locate, read_checkpoint
from prism.weights.views import view_weights
from tests.support import checkpoints
from tests.weights.support import checkpoint_source, dummy_source, rewrite, state_of, write_config

CPU = torch.device("cpu")
TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def assert_packed(packed: PackedWeights, layout: Layout, state: dict[str, torch.Tensor]) -> None:
    """Every entry is its sources, one after the other, in the layout's number format."""
    views = view_weights(layout, packed.address, CPU)
    for entry in layout.entries:
        parts = [state[source.name].to(TORCH[entry.dtype]) for source in entry.sources]
        assert torch.equal(views[entry.name], torch.cat(parts)), entry.name


def assert_checksums(packed: PackedWeights) -> None:
    factors, size = checksum.factors(), checksum.CHUNK_BYTES
    chunks = [packed.data[i : i + size] for i in range(0, packed.total_bytes, size)]
    assert packed.checksums.tolist() == [checksum.checksum(chunk, factors) for chunk in chunks]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.make_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_all_families_survive(family: str, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model(family), tmp_path)
    source = checkpoint_source(tmp_path)
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))
        assert_checksums(packed)


@pytest.mark.parametrize("stored", list(TORCH.values()))
@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp32"])
def test_number_formats_are_converted(stored: torch.dtype, asked: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    rewrite(tmp_path, {name: tensor.to(stored) for name, tensor in state_of(llama).items()})
    source = checkpoint_source(tmp_path, dtype=asked)
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))


def test_shards_are_joined(tmp_path: Path) -> None:
    checkpoints.make_model("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = checkpoint_source(tmp_path)
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(tmp_path))


def test_tied_embeddings_have_no_head_of_their_own(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make_model("llama", tie_word_embeddings=True), tmp_path)
    source = checkpoint_source(tmp_path)
    layout = plan_source(source)
    assert "lm_head" not in {entry.name for entry in layout.entries}
    with pack_here(source) as packed:
        assert_packed(packed, layout, state_of(tmp_path))


def test_tensors_that_are_not_needed_and_names_without_prefix_are_fine(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    state = state_of(llama)
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.int64)}
    rewrite(tmp_path, {name.removeprefix("model."): tensor for name, tensor in state.items()} | extra)
    source = checkpoint_source(tmp_path)
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state)


def test_large_tensors_are_cut_into_pieces(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1000)
    source = checkpoint_source(llama, dtype="bf16")
    with pack_here(source) as packed:
        assert_packed(packed, plan_source(source), state_of(llama))


# --- checkpoints that cannot be packed -------------------------------------------------------------


def without_a_tensor(directory: Path) -> None:
    state = state_of(directory)
    del state["model.layers.1.mlp.up_proj.weight"]
    rewrite(directory, state)


def with_a_wrong_shape(directory: Path) -> None:
    state = state_of(directory)
    state["model.norm.weight"] = torch.ones(63)
    rewrite(directory, state)


def with_a_transposed_matrix(directory: Path) -> None:
    state = state_of(directory)
    state["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"].T
    rewrite(directory, state)


def with_integers(directory: Path) -> None:
    state = state_of(directory)
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.int8)
    rewrite(directory, state)


def truncated(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as stream:
        stream.truncate(10_000)


def with_another_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("problem", "damage"),
    [
        ("model.layers.1.mlp.up_proj.weight: missing tensor", without_a_tensor),
        (r"model.norm.weight: has shape \[63\], config.json asks for \[64\]", with_a_wrong_shape),
        ("down_proj.weight: has shape", with_a_transposed_matrix),
        ("lm_head.weight: dtype I8 not supported; known: BF16, F16, F32", with_integers),
        ("model.safetensors: .*truncated", truncated),
        ("model.layers.3.input_layernorm.weight: missing tensor", with_another_config),
    ],
)
def test_the_reason_names_file_and_tensor(
    problem: str, damage: Callable[[Path], None], llama: Path, tmp_path: Path
) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=problem) as caught:
        pack_here(checkpoint_source(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    layout = plan_source(checkpoint_source(tmp_path))
    located = locate(layout, read_checkpoint(tmp_path), tmp_path)
    truncated(tmp_path)
    *_, last = pieces.checkpoint_pieces(layout, located)
    with pytest.raises(CheckpointError, match="the file ends early"):
        last.fill(np.empty(layout.total_bytes, np.uint8))


# --- random weights --------------------------------------------------------------------------------


def test_random_weights_are_plausible_and_repeatable(tmp_path: Path) -> None:
    source = dummy_source(tmp_path, architectures=["Qwen3ForCausalLM"], hidden_size=256, vocab_size=4096)
    layout = plan_source(source)
    with pack_here(source) as packed, pack_here(source) as again:
        assert (packed.data == again.data).all()
        views = view_weights(layout, packed.address, CPU)
        for name, tensor in views.items():
            numbers = tensor.float()
            assert numbers.isfinite().all() and numbers.std() > 0.01, name
            if name.endswith("norm"):
                assert 0.8 < numbers.mean() < 1.2, name
            else:
                assert abs(numbers.mean()) < 0.01 and 0.015 < numbers.std() < 0.15, name
        assert not torch.equal(views["layers.0.down"], views["layers.1.down"])
        assert len(views["embed"].unique(dim=0)) == 4096


def test_other_names_have_other_weights(tmp_path: Path) -> None:
    with pack_here(dummy_source(tmp_path, "a")) as a, pack_here(dummy_source(tmp_path, "b")) as b:
        assert a.fingerprint == b.fingerprint
        assert (a.data != b.data).mean() > 0.5


def test_pieces_of_random_weights_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dummy_source(tmp_path)
    with pack_here(source) as whole:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 600)
        with pack_here(source) as pieced:
            assert (whole.data == pieced.data).all()


# --- the process -----------------------------------------------------------------------------------


def run(job: PackJob) -> tuple[int, list[PackEvent]]:
    result = subprocess.run(
        [sys.executable, "-m", "prism.weights.packer", msgspec.json.encode(job).decode()],
        pass_fds=(job.fd,),
        stdout=subprocess.PIPE,
        check=False,
    )
    return result.returncode, [
        msgspec.json.decode(line, type=PackEvent) for line in result.stdout.splitlines()
    ]


def test_the_process_says_how_it_goes(tmp_path: Path) -> None:
    source = dummy_source(tmp_path)
    total = plan_source(source).total_bytes
    fd = memfd.create_memfd("prism-test")
    status, events = run(PackJob(source=source, fd=fd, total_bytes=total))
    size = os.fstat(fd).st_size
    os.close(fd)
    assert status == 0 and size == file_bytes(total)
    assert [type(event).__name__ for event in events] == ["Progress"] * (len(events) - 1) + ["Packed"]
    done = [event.done_bytes for event in events[:-1]]  # type: ignore[union-attr]
    assert done == sorted(done) and done[0] == 0 and total - 256 < done[-1] <= total


def test_the_process_reports_a_bad_checkpoint(tmp_path: Path) -> None:
    source = checkpoint_source(write_config(tmp_path))
    status, events = run(PackJob(source=source, fd=1, total_bytes=1))
    assert status == 1
    assert msgspec.to_builtins(events) == [
        {
            "type": "BadCheckpoint",
            "message": "holds neither model.safetensors nor model.safetensors.index.json",
            "file": str(tmp_path),
            "tensor": None,
        }
    ]


def test_the_process_never_imports_torch() -> None:
    code = "import sys, prism.weights.packer; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
