"""Checkpoints that lie, are cut off or do not fit: every complaint names file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prism.errors import CheckpointError
from prism.weights.safetensors_index import read_checkpoint, read_header

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(first: int, last: int, shape: list[Any] | None = None, dtype: Any = "F32") -> Header:
    return {
        "dtype": dtype,
        "shape": [(last - first) // 4] if shape is None else shape,
        "data_offsets": [first, last],
    }


def test_a_real_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    state = {
        "a": torch.arange(6).view(2, 3).to(torch.bfloat16),
        "b": torch.ones(4),
        "empty": torch.ones(0, 3),
    }
    save_file(state, file, metadata={"format": "pt"})
    tensors = read_checkpoint(tmp_path)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "a": ("BF16", (2, 3)),
        "b": ("F32", (4,)),
        "empty": ("F32", (0, 3)),
    }
    stored = tensors["b"]
    content = file.read_bytes()[stored.offset : stored.offset + stored.size]
    assert torch.equal(torch.frombuffer(bytearray(content), dtype=torch.float32), state["b"])


def test_formats_of_other_tensors_do_not_matter(tmp_path: Path) -> None:
    header = {"a": entry(0, 3, [6], "F4"), "b": entry(3, 11, [1], "I64")}
    assert set(read_header(write(tmp_path / "x.safetensors", header, bytes(11)))) == {"a", "b"}


@pytest.mark.parametrize(
    ("problem", "header", "data"),
    [
        ("past the file", {"a": entry(0, 16)}, bytes(12)),
        ("belong to no tensor", {"a": entry(0, 16)}, bytes(20)),
        ("belong to no tensor", {}, bytes(4)),
        ("overlaps", {"b": entry(0, 16), "a": entry(8, 24)}, bytes(24)),
        ("follows a gap", {"b": entry(0, 8), "a": entry(12, 24)}, bytes(24)),
        ("cannot hold", {"a": entry(0, 16, [5])}, bytes(16)),
        ("cannot hold", {"a": entry(0, 16, [2**62, 2**62])}, bytes(16)),
        ("bad shape", {"a": entry(0, 16, [-4])}, bytes(16)),
        ("bad shape", {"a": entry(0, 16, [4.0])}, bytes(16)),
        ("bad shape", {"a": entry(0, 4, [True])}, bytes(4)),
        ("bad shape", {"a": entry(16, 0, [4])}, bytes(16)),
        ("bad shape", {"a": entry(-16, 0, [4])}, bytes(16)),
        ("needs dtype", {"a": {"dtype": "F32", "shape": [4]}}, bytes(16)),
        ("needs dtype", {"a": entry(0, 16, dtype=7)}, bytes(16)),
        ("needs dtype", {"a": [0, 16]}, bytes(16)),
    ],
)
def test_a_header_that_lies_is_refused(problem: str, header: Header, data: bytes, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_header(file)
    assert caught.value.file == str(file)
    assert caught.value.tensor == ("a" if "a" in header and "no tensor" not in problem else None)


@pytest.mark.parametrize(
    ("problem", "content"),
    [
        ("does not fit a file of 0", b""),
        ("does not fit a file of 5", b"\x02\0\0\0\0"),
        ("does not fit a file of 10", (3).to_bytes(8, "little") + b"{}"),
        ("does not fit", (2**63).to_bytes(8, "little") + b"{}"),
        ("JSON", (2).to_bytes(8, "little") + b"{!"),
        ("JSON", (2).to_bytes(8, "little") + b"\xff\xfe"),
        ("JSON object", (2).to_bytes(8, "little") + b"[]"),
        ("used twice", (15).to_bytes(8, "little") + b'{"a":{},"a":{}}'),
        ("JSON", (90_000).to_bytes(8, "little") + b"[" * 90_000),
    ],
)
def test_a_file_that_is_none_is_refused(problem: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.file == str(file)


def index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined(tmp_path: Path) -> None:
    write(tmp_path / "x-1.safetensors", {"a": entry(0, 8), "unlisted": entry(8, 16)}, bytes(16))
    write(tmp_path / "x-2.safetensors", {"b": entry(0, 8)}, bytes(8))
    index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    tensors = read_checkpoint(tmp_path)
    assert {name: t.file.name for name, t in tensors.items()} == {
        "a": "x-1.safetensors",
        "b": "x-2.safetensors",
    }


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", 7, "a\0.safetensors"],
)
def test_shards_lie_nowhere_else(tmp_path: Path, shard: object) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "x.safetensors", {"a": entry(0, 8)}, bytes(8))
    index(tmp_path / "model", {"a": shard})
    with pytest.raises(CheckpointError, match="no shard's file name") as caught:
        read_checkpoint(tmp_path / "model")
    assert caught.value.tensor == "a"


def missing_shard(directory: Path) -> None:
    index(directory, {"a": "x.safetensors"})


def missing_tensor(directory: Path) -> None:
    write(directory / "x.safetensors", {"b": entry(0, 8)}, bytes(8))
    index(directory, {"a": "x.safetensors"})


def no_weight_map(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")


def nothing(directory: Path) -> None:
    pass


def a_directory(directory: Path) -> None:
    (directory / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    ("problem", "prepare"),
    [
        ("x.safetensors: cannot be read: No such file", missing_shard),
        ("x.safetensors: a: missing tensor", missing_tensor),
        ("no weight_map", no_weight_map),
        ("holds neither", nothing),
        ("cannot be read", a_directory),
    ],
)
def test_what_is_missing_is_named(problem: str, prepare: Callable[[Path], None], tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=problem):
        read_checkpoint(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=200)
@given(st.data())
def test_no_damage_escapes_as_another_error(tmp_path: Path, data: st.DataObject) -> None:
    """A damaged header is refused or, where the damage does not matter, read within the file."""
    file = tmp_path / "x.safetensors"
    write(file, {"a": entry(0, 16), "b": entry(16, 24, [1, 2])}, bytes(24))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    assert all(t.offset >= 0 and t.offset + t.size <= file.stat().st_size for t in tensors.values())
